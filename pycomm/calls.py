"""What the calls of a Communicator have in common: the Work of asynchronous ones, timeouts, tensors in flight."""

from __future__ import annotations

from collections import deque

import torch

from pycomm import _C
from pycomm.backends import Backend

__all__ = ["Calls", "InFlight", "Work", "checked_timeout"]

InFlight = deque[tuple[_C.Work, tuple[torch.Tensor, ...]]]


class Work:
    """An asynchronous operation. It keeps its tensors alive until it is done, even if the Work itself is dropped."""

    def __init__(self, core: _C.Work) -> None:
        self._core = core

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is done; raise what went wrong in it.

        Args:
            timeout_s: seconds to wait here; None: as long as the operation's own timeout lets it run.

        Raises:
            TimeoutError: not done after ``timeout_s``; the operation goes on.
            PycommError: the operation failed.
        """
        self._core.wait(timeout_s)

    def done(self) -> bool:
        """True once the operation is over, well or not."""
        return self._core.done()

    def announce(self, completions: _C.Completions, token: int) -> None:
        """Put ``token`` into ``completions`` when the operation is over, at once if it is."""
        completions.watch(self._core, token)

    @property
    def source(self) -> int:
        """After the end of a ``recv``: the rank that sent."""
        return self._core.source()


class Calls:
    """A rank of a group, and the operations that it has under way."""

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self.rank = backend.rank
        self.world_size = backend.world_size
        self.device = backend.device
        self.timeout_s = timeout_s
        self._backend = backend
        self._in_flight: InFlight = deque()

    def _timeout(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else checked_timeout(timeout_s)

    def _work(self, core: _C.Work, *tensors: torch.Tensor | None) -> Work:
        self._drop_finished()
        self._in_flight.append((core, tuple(tensor for tensor in tensors if tensor is not None)))
        return Work(core)

    def _outcome(self, core: _C.Work | None, *tensors: torch.Tensor | None) -> Work | None:
        """Of a call: its Work, if it has one, which keeps the tensors."""
        if core is not None:
            return self._work(core, *tensors)
        if self._in_flight:
            self._drop_finished()
        return None

    def _drop_finished(self) -> None:
        while self._in_flight and self._in_flight[0][0].done():
            self._in_flight.popleft()


def checked_timeout(timeout_s: float) -> float:
    """``timeout_s``, or ValueError if it is no positive number of seconds."""
    if not timeout_s > 0:  # false for nan, too
        raise ValueError(f"timeout_s={timeout_s}: it is a positive number of seconds")
    return timeout_s
