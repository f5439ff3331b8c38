"""The thread that runs a group's collectives in issue order, and batches of messages."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch

from pycomm import _C
from pycomm.errors import PycommError

__all__ = ["CallQueue", "together", "weakly"]


def together(works: Sequence[_C.Work], waits: _C.Waits) -> _C.Work:
    """A Work that is over when all of ``works`` are."""

    def wait(timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for work in works:
            work.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))

    return _C.Work.relayed(waits, "a batch of messages", works, wait)


def weakly(method: Callable[[], object]) -> Callable[[], None]:
    """``method``, as long as its object lives, without keeping that alive."""
    found = weakref.WeakMethod(method)

    def call() -> None:
        if (alive := found()) is not None:
            alive()

    return call


class CallQueue:
    """Runs one call after the other on a thread of its own, which starts with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: deque[tuple[_C.Work, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._running: _C.Work | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    def submit(self, work: _C.Work, body: Callable[[], None]) -> None:
        with self._changed:
            if self._stopping:
                raise PycommError("the communicator is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._calls.append((work, body))
            self._changed.notify_all()

    def is_awaited(self) -> bool:
        """Whether somebody waits for one of the calls."""
        with self._changed:
            running = [] if self._running is None else [self._running]
            return any(operation.is_awaited() for operation in [*running, *(queued for queued, _ in self._calls)])

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued; False if ``timeout_s`` passes before."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._calls and self._running is None, timeout_s)

    def stop(self, timeout_s: float) -> None:
        """End the thread after the call that it is in, which takes ``timeout_s`` at most or is left to itself."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    @torch.no_grad()
    def _loop(self) -> None:
        _C.serve_callers()
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._calls or self._stopping)
                if not self._calls:
                    return
                work, body = self._calls.popleft()
                self._running = work
            try:
                body()
            except Exception as error:  # noqa: BLE001  (whoever waits for it must see whatever it was)
                work.fail(error)
            else:
                work.finish()
            del work, body  # and the tensors that they keep
