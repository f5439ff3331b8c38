"""Ctrl-C and termination, made orderly.

Before training, SIGINT and SIGTERM interrupt at once. From then on the first one asks for a stop after the current
step, so that a checkpoint can be written, and the second interrupts.
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopSignals:
    """Remembers that a stop was asked for.

    Attributes:
        signum: the signal that asked, None as long as none did.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._orderly = False

    def install(self) -> None:
        """Handle SIGINT and SIGTERM from now on; those that were blocked until now arrive here. Main thread only.

        Raises:
            KeyboardInterrupt: one had arrived already.
        """
        for signum in STOPPING:
            signal.signal(signum, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first = self.signum is None
        self.signum = self.signum or signum
        if not (self._orderly and first):
            raise KeyboardInterrupt

    def become_orderly(self) -> None:
        """From now on a first signal only sets ``signum``."""
        self._orderly = True

    def ignore(self) -> None:
        """From now on nothing happens at SIGINT and SIGTERM, not even while the interpreter shuts down."""
        for signum in STOPPING:
            signal.signal(signum, signal.SIG_IGN)

    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.signum is not None

    def exit_code(self) -> int:
        """128 plus the signal's number, as shells have it."""
        return 128 + (self.signum or signal.SIGINT)


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent dies, even by SIGKILL.

    Args:
        parent_pid: ``os.getppid()`` as it was when the process began; if the parent has died since, the signal is sent
            by this function.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGTERM)
