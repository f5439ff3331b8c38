"""An asynchronous call of the NCCL back end."""

from __future__ import annotations

from collections.abc import Callable

from pycomm import _C
from pycomm.backends.gloo.operations import Waits

__all__ = ["NcclWork"]

_NO_BOUND_S = 1e8  # the operation's own deadline ends it


class NcclWork:
    """What :class:`pycomm._C.Work` is on the host transport.

    Args:
        operation: what was enqueued.
        check: raises what has gone wrong with the communicator.
        current_stream: the handle of the caller's stream.
        waits: of the communicator.
        source: of a receive.
        blocks: waiting blocks the host (barriers), instead of ordering the current stream behind the operation.
    """

    def __init__(
        self,
        operation: _C.NcclOperation,
        check: Callable[[str, int], None],
        current_stream: Callable[[], int],
        waits: Waits,
        source: int = -1,
        blocks: bool = False,
    ) -> None:
        self._operation = operation
        self._check = check
        self._current_stream = current_stream
        self._waits = waits
        self._source = source
        self._blocks = blocks

    def done(self) -> bool:
        """Over on the device, or the communicator has failed."""
        return self._operation.over()

    def source(self) -> int:
        return self._source

    def wait(self, timeout_s: float | None = None) -> None:
        """Make the current stream wait for the operation; with ``timeout_s`` make the host wait, too.

        Raises:
            TimeoutError: not over after ``timeout_s``; it goes on.
            PycommError: the communicator has failed.
        """
        operation = self._operation
        self._check(operation.call, operation.seq)
        operation.make_wait(self._current_stream())
        if timeout_s is None and not self._blocks:
            return
        with self._waits.inside(operation.call):
            is_over = operation.wait(_NO_BOUND_S if timeout_s is None else timeout_s)
        if not is_over:
            raise TimeoutError(f"{operation.call}: not done after {timeout_s:g} s; it goes on")
        self._check(operation.call, operation.seq)
