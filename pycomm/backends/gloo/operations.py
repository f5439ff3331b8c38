"""The thread that runs a group's collectives in issue order, and batches of messages."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from pycomm import _C
from pycomm.errors import PycommError

__all__ = ["CallQueue", "together"]


def together(works: Sequence[_C.Work], waits: _C.Waits) -> _C.Work:
    """A Work that is over when all of ``works`` are."""

    def wait(timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for work in works:
            work.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))

    return _C.Work.relayed(waits, "a batch of messages", works, wait)


class CallQueue:
    """Runs one call after the other on a thread of its own, which starts with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: deque[tuple[_C.Work, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._busy = False
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

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued; False if ``timeout_s`` passes before."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._calls and not self._busy, timeout_s)

    def stop(self, timeout_s: float) -> None:
        """End the thread after the call that it is in, which takes ``timeout_s`` at most or is left to itself."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    @torch.no_grad()
    def _loop(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._calls or self._stopping)
                if not self._calls:
                    return
                work, body = self._calls.popleft()
                self._busy = True
            try:
                body()
            except Exception as error:  # noqa: BLE001  (whoever waits for it must see whatever it was)
                work.fail(error)
            else:
                work.finish()
            del work, body  # and the tensors that they keep
