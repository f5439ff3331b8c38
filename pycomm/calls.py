"""What the calls of a Communicator have in common: the Work of asynchronous ones, and tensors in flight."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from pycomm import _C
from pycomm.backends import Backend

__all__ = ["InFlight", "RankCalls", "Work"]


class InFlight:
    """Operations under way, in the order of their calls, and what each of them keeps alive."""

    def __init__(self) -> None:
        self._operations: deque[tuple[_C.Work, tuple[Any, ...]]] = deque()
        self._dropping = threading.Lock()

    def add(self, core: _C.Work, tensors: tuple[Any, ...]) -> None:
        self._operations.append((core, tensors))
        self.drop_finished()

    def drop_finished(self) -> None:
        if not self._dropping.acquire(blocking=False):
            return  # another thread is at it, or this one, below a signal handler
        try:
            while self._operations and self._operations[0][0].done():
                self._operations.popleft()
        except IndexError:
            pass  # clear() came between
        finally:
            self._dropping.release()

    def wait(self) -> None:
        """Wait for all that are under way now; raise what went wrong in the first of them that failed."""
        for core, _ in list(self._operations):
            core.wait()
        self.drop_finished()

    def clear(self) -> None:
        self._operations.clear()


class Work:
    """An asynchronous operation. It keeps its tensors alive until it is done, even if the Work itself is dropped."""

    def __init__(self, core: _C.Work, in_flight: InFlight) -> None:
        self._core = core
        self._in_flight = in_flight

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is done; raise what went wrong in it.

        Args:
            timeout_s: seconds to wait here, 0 to look once; None: as long as the operation's own timeout lets it run.

        Raises:
            TimeoutError: not done after ``timeout_s``; the operation goes on.
            PycommError: the operation failed.
        """
        self._core.wait(None if timeout_s is None else _C.checked_timeout(timeout_s, or_zero=True))
        self._in_flight.drop_finished()

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


class RankCalls:
    """A rank of a group, and the operations that it has under way."""

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self.rank = backend.rank
        self.world_size = backend.world_size
        self.device = backend.device
        self._backend = backend
        self._calls = backend.calls
        self._timeout_s = timeout_s
        self._in_flight = InFlight()

    @property
    def timeout_s(self) -> float:
        """Seconds that any wait for another rank may take, in calls that are given no other."""
        return self._timeout_s

    def _work(self, core: _C.Work, *tensors: Any) -> Work:
        self._in_flight.add(core, tensors)
        return Work(core, self._in_flight)
