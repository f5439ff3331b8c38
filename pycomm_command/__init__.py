"""The first lines of the ``pycomm`` command and of the workers that it starts: who sees Ctrl-C, and who ends with whom.

A package of its own beside ``pycomm``, since importing that loads torch, which takes seconds, and a signal must find
its way from the first line on. It needs nothing but the standard library, and importing it changes nothing.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

__all__ = ["STOPPING", "StopSignals", "end_with_parent", "main", "work"]

STOPPING = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopSignals:
    """Sees SIGINT and SIGTERM on a thread of its own, and does what the program has asked for.

    A Python handler runs on the main thread, between two of its instructions: late where that is inside a long C++ call
    (waiting for a store, training a tokenizer), and as an exception in the middle of anything, such as starting a
    process. Here the handlers do nothing; Python's C code also writes each signal's number into a pipe, which the
    thread reads. What happens then:

    - at first: the process ends at once, with 128 plus the signal's number; it has nothing to lose yet;
    - after ``interrupt``: the main thread gets a KeyboardInterrupt, and a second signal ends the process;
    - after ``become_orderly``: the first is only remembered in ``signum``, the second is a KeyboardInterrupt, the third
      ends the process;
    - after ``ignore``: nothing.

    Attributes:
        signum: the first signal that came, None as long as none did.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._bearable: float = 0  # signals that the process survives from now on
        self._listens = self._speaks = False
        self._raises = False  # the main thread's handler has to raise
        self._num_own = 0  # numbers in the pipe that interrupt_main has put there

    def listen(self, speaks: bool = True) -> None:
        """Look for the signals from now on. Main thread only, in which they stay blocked: children begin so.

        Args:
            speaks: say "interrupted" on stderr when the process ends at once; one process of a run does.
        """
        self._listens, self._speaks = True, speaks
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for signum in STOPPING:
            signal.signal(signum, self._handle)
        _thread.start_new_thread(self._serve, (reader,))

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._raises:
            self._raises = False
            raise KeyboardInterrupt

    def _serve(self, reader: int) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        while True:
            (signum,) = os.read(reader, 1)
            if signum == signal.SIGINT and self._num_own:
                self._num_own -= 1
            elif signum in STOPPING:
                self.arrived(signum)

    def arrived(self, signum: int) -> None:
        """What is done when a signal comes; on the listening thread."""
        self.signum = self.signum or signum
        self._bearable -= 1
        if self._bearable < 0:
            if self._speaks:
                os.write(2, b"interrupted\n")
            os._exit(self.exit_code())
        if self._bearable == 0:
            self._raises = True
            self._num_own += 1
            _thread.interrupt_main(signal.SIGINT)

    def interrupt(self) -> None:
        """From now on a first signal is a KeyboardInterrupt of the main thread."""
        self._bearable = 1

    def become_orderly(self) -> None:
        """From now on a first signal only sets ``signum``."""
        self._bearable = 2

    def ignore(self) -> None:
        """From now on nothing happens at SIGINT and SIGTERM, nor while the interpreter shuts down. Main thread only."""
        self._bearable = float("inf")
        if self._listens:
            for signum in STOPPING:
                signal.signal(signum, signal.SIG_IGN)  # the interpreter's end would put its default back: to die of it

    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.signum is not None

    def exit_code(self) -> int:
        """128 plus the signal's number, as shells have it."""
        return 128 + (self.signum or signal.SIGINT)


def main() -> int:
    """The ``pycomm`` command; returns its exit code."""
    signals = StopSignals()
    signals.listen()
    return _run(signals)


def _run(signals: StopSignals) -> int:
    from pycomm import cli

    try:
        return cli.main(sys.argv[1:], signals)
    finally:
        signals.ignore()  # the exit code stands


def work(launcher_pid: int, local_rank: int) -> NoReturn:
    """The ``pycomm`` command in a worker that process ``launcher_pid`` has started, both signals blocked."""
    end_with_parent(launcher_pid)
    signals = StopSignals()
    signals.listen(speaks=local_rank == 0)
    sys.exit(_run(signals))


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    Args:
        parent_pid: who has started this process; if it has ended already, so does this one.
    """
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)
