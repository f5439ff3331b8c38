"""Operations of a back end in Python, and the thread that runs a group's collectives in issue order."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pycomm import _C
from pycomm.backends.causes import raised
from pycomm.errors import PycommError

__all__ = ["CallQueue", "LocalOperation", "Operation", "Together", "Waits"]


_LOOK_S = 0.25


class Waits:
    """What each thread waits for in a communicator, innermost last. A signal handler runs inside such a wait.

    Args:
        rank: for messages.
        look: called again and again while a thread waits for long.
        rest: called after that.
    """

    def __init__(
        self, rank: int, group: str, look: Callable[[], object] = int, rest: Callable[[], object] = int
    ) -> None:
        self._rank = rank
        self._group = group
        self._look = look
        self._rest = rest
        self._calls: dict[int, list[tuple[str, bool]]] = {}

    @contextmanager
    def inside(self, call: str, *, collective: bool = False) -> Iterator[None]:
        calls = self._calls.setdefault(threading.get_ident(), [])
        calls.append((call, collective))
        try:
            yield
        finally:
            calls.pop()

    def wait(self, call: str, work: _C.Work, timeout_s: float | None) -> None:
        """Wait for ``work`` inside ``call``; TimeoutError after ``timeout_s`` (None: never), and it goes on."""
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        shown: _C.LongWait | None = None
        with self.inside(call):
            try:
                while (left_s := deadline - time.monotonic()) > _LOOK_S:
                    try:
                        return _C.Work.wait(work, _LOOK_S)
                    except TimeoutError:
                        shown = shown or _C.LongWait(work)
                        self._look()
                _C.Work.wait(work, max(left_s, 0.0))
            finally:
                if shown is not None:
                    shown = None  # an error's traceback would keep it
                    self._rest()

    def of_this_thread(self) -> str | None:
        """The call that this thread waits in, or None."""
        calls = self._calls.get(threading.get_ident())
        return f"{calls[-1][0]} of group {self._group!r}" if calls else None

    def check_outside(self) -> None:
        """PycommError inside a collective that is waited for: as on the host transport, which could not go on."""
        found = [call for call, collective in self._calls.get(threading.get_ident(), ()) if collective]
        if found:
            raise PycommError(
                f"rank {self._rank} is inside {found[-1]} of group {self._group!r}: a signal handler cannot make "
                "another call of that communicator there. Let it set a flag for after the call, or call close() or "
                "abort(), which end the call"
            )


class Operation(_C.Work):
    """Something under way that Python code ends once, well or not."""

    def __init__(self, call: str, waits: Waits) -> None:
        super().__init__()
        self.call = call
        self._waits = waits
        self._lock = threading.RLock()  # a signal handler may come while this thread holds it
        self._error: BaseException | None = None

    def finish(self, source: int = -1) -> None:
        with self._lock:
            super().finish(source)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if not self.done():
                self._error = error
                super().finish()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return at its end, or raise its error; TimeoutError after ``timeout_s``, and it goes on."""
        self._waits.wait(self.call, self, timeout_s)
        if self._error is not None:
            raise raised(self._error.with_traceback(None))


class LocalOperation(_C.Work):
    """A message inside this host: the host transport's Work, with ranks of the whole group in source and errors."""

    def __init__(
        self, work: _C.Work, ranks: Sequence[int], translate: Callable[[BaseException], BaseException], waits: Waits
    ) -> None:
        super().__init__()
        self._work = work
        self._ranks = ranks
        self._translate = translate
        self._waits = waits
        self.finish_after([work])

    def source(self) -> int:
        return self._ranks[self._work.source()]

    def wait(self, timeout_s: float | None = None) -> None:
        self._waits.wait("a message inside the host", self, timeout_s)
        try:
            self._work.wait()
        except PycommError as error:
            raise raised(self._translate(error)) from None


class Together(_C.Work):
    """Operations that are over together."""

    def __init__(self, operations: Sequence[_C.Work], waits: Waits) -> None:
        super().__init__()
        self._operations = operations
        self._waits = waits
        self.finish_after(operations)

    def source(self) -> int:
        return next((operation.source() for operation in self._operations), -1)

    def wait(self, timeout_s: float | None = None) -> None:
        self._waits.wait("a batch of messages", self, timeout_s)
        for operation in self._operations:
            operation.wait()


class CallQueue:
    """Runs one call after the other on a thread of its own, which starts with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: deque[tuple[Operation, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._running: Operation | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    def submit(self, operation: Operation, body: Callable[[], None]) -> None:
        with self._changed:
            if self._stopping:
                raise PycommError("the communicator is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._calls.append((operation, body))
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
                operation, body = self._calls.popleft()
                self._running = operation
            try:
                body()
            except Exception as error:  # noqa: BLE001  (whoever waits for it must see whatever it was)
                operation.fail(error)
            else:
                operation.finish()
            del operation, body  # and the tensors that they keep
