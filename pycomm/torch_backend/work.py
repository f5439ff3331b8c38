"""The Work of the torch.distributed back end, and the thread that completes futures.

``wait`` waits in the thread that calls it. Only futures need a thread of their own: there is one a process, started
with the first future that is asked for before its operation is over. It sleeps in the extension until an operation
ends; the threads that end one only leave its number there, so none of them ever takes the GIL.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from pycomm import _C
from pycomm._C import Work
from pycomm.backends.causes import listeners
from pycomm.torch_backend import seconds_of
from pycomm.torch_backend.tensors import Finish

__all__ = ["NO_TIMEOUT", "PycommWork"]

NO_TIMEOUT = timedelta(0)  # how torch.distributed says so
_AT_ONCE_S = 1e-6
_JOIN_S = 5.0
_LOOK_S = 0.25


class PycommWork(dist.Work):
    """One call of a process group: operations of one communicator, in order, and what is left to do after them.

    Args:
        operations: empty: the call is over already.
        outputs: the tensors that it writes, which is what its future holds.
        finish: runs once, in the first thread that sees the end of the operations.
    """

    def __init__(self, operations: Sequence[Work], outputs: list[torch.Tensor], finish: Finish = None) -> None:
        super().__init__()
        self.operations = operations
        self.outputs = outputs
        self._finish = finish
        self._devices: list[torch.device | str | int] = []  # of its future
        self._lock = threading.Lock()
        self._ended: torch.futures.Future[None] | None = None
        self._future: torch.futures.Future[list[torch.Tensor]] | None = None

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        """Return True when the call is over; raise what went wrong in it, or TimeoutError, after which it goes on."""
        if timeout > NO_TIMEOUT:
            deadline = time.monotonic() + seconds_of(timeout)
            for operation in self.operations:
                operation.wait(max(deadline - time.monotonic(), _AT_ONCE_S))
        else:
            for operation in self.operations:
                operation.wait()
        if self._finish is not None:
            self._finish_once()
        return True

    def is_completed(self) -> bool:
        return self.pending() is None and (self.exception() is not None or self.wait())

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> Exception | None:
        """What went wrong, once the call is over."""
        try:
            for operation in self.operations:
                if operation.done():
                    operation.wait()
        except (RuntimeError, OSError, MemoryError) as error:
            return error
        return None

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self.outputs

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        """Of a receive that is over: the rank in the group that sent."""
        return self.operations[0].source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Completes when the call does, without anybody waiting, with the tensors that it wrote.

        What went wrong is a RuntimeError there, which has the error's name and words: a future that C++ may wait for,
        as DDP does, takes a Python exception from a callback only.
        """
        with self._lock:
            if self._future is not None:
                return self._future
            self._ended = torch.futures.Future(devices=self._devices)
            self._future = self._ended.then(self._outcome)
        self._resolve_in_time()
        return self._future

    def pending(self) -> Work | None:
        """An operation that is not over."""
        return next((operation for operation in self.operations if not operation.done()), None)

    def resolve(self) -> None:
        """Complete the future of a call that is over."""
        assert self._ended is not None
        self._ended.set_result(None)

    def _resolve_in_time(self) -> None:
        if self.pending() is None:
            self.resolve()
        else:
            _completion_thread().watch(self)

    def _outcome(self, _: torch.futures.Future[None]) -> list[torch.Tensor]:
        self.wait()
        return self.outputs

    def _finish_once(self) -> None:
        with self._lock:  # whoever comes second waits for the first to be through
            if self._finish is not None:
                self._finish()
                self._finish = None
                self._finished()

    def _finished(self) -> None:
        """``finish`` has run."""


class _CompletionThread:
    """Completes futures. Daemonic, since a process may end while operations are under way, and stopped before then."""

    def __init__(self) -> None:
        self._completions = _C.Completions()
        self._tokens = itertools.count()
        self._watched: dict[int, PycommWork] = {}  # keeps a Work whose future alone was kept
        self._shown: _C.ShownWait | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="pycomm-futures", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def watch(self, work: PycommWork) -> None:
        """Resolve ``work`` when it is over, in this thread if it is."""
        pending = work.pending()
        if pending is None:
            work.resolve()
            return
        token = next(self._tokens)
        self._watched[token] = work
        pending.announce(self._completions, token)

    def _run(self) -> None:
        while True:
            try:
                token = self._completions.take(_LOOK_S)
            except TimeoutError:
                self._show_wait()
                continue
            if token is None:
                return
            self.watch(self._watched.pop(token))  # of several operations, others may be under way

    def _show_wait(self) -> None:
        """Nothing has ended for a while: whoever waits for a future does not say so, and is taken to."""
        waits = bool(self._watched)
        if waits != (self._shown is not None):
            self._shown = _C.ShownWait(for_work=True) if waits else None
        for listener in list(listeners()):
            if waits:
                listener.look()
            else:
                listener.rest()

    def _stop(self) -> None:
        if os.getpid() != self._process:
            return  # a forked child, which has no such thread
        self._completions.close()
        self._thread.join(_JOIN_S)


@functools.cache
def _completion_thread() -> _CompletionThread:
    return _CompletionThread()


os.register_at_fork(after_in_child=_completion_thread.cache_clear)  # a child has none of its parent's threads
