"""Point-to-point messages of a Communicator: send, receive, and batches of both that progress together.

FIFO per (peer, direction, tag) and independent of collectives. docs/algorithms.md says how the bytes travel.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from pycomm._C import Calls, Work
from pycomm.errors import PycommError

__all__ = ["Batch", "Messages"]


class Messages:
    """Messages between two ranks. Tensors are contiguous and of any dtype that collectives move.

    Both sides need one dtype and number of elements: ``MismatchError`` on both otherwise, or on the receiver alone if
    the send had returned.
    """

    _calls: Calls

    def send(
        self, tensor: Any, dst: int, tag: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Send ``tensor`` to rank ``dst``. Returns when it may be changed again, which for large tensors is not before
        ``dst`` receives it.

        Args:
            tag: any integer; matches the receive's.
        """
        return self._calls.send(tensor, dst, tag, async_op, timeout_s)

    def recv(
        self,
        tensor: Any,
        src: int | None = None,
        tag: int = 0,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> int | Work:
        """Receive into ``tensor`` from rank ``src``, or from whoever sends (None).

        Returns:
            The rank that sent; with ``async_op`` a Work, whose ``source`` it is in the end.
        """
        return self._calls.recv(tensor, src, tag, async_op, timeout_s)

    def batch(self, *, async_op: bool = False, timeout_s: float | None = None) -> Batch:
        """Messages that progress together, so that ranks can exchange without minding whose turn it is::

            with comm.batch() as b:
                b.send(mine, right)
                b.recv(theirs, left)

        They start when the block ends, which waits for all of them, unless ``async_op``: then ``b.work`` is their Work.
        A block that raises starts none.
        """
        return Batch(self._calls, async_op, timeout_s)


class Batch:
    """See :meth:`Messages.batch`.

    Attributes:
        work: after the block, with ``async_op``: ends when all messages have.
        sources: after the block, without ``async_op``: of each message in order, the rank that sent it.
    """

    def __init__(self, calls: Calls, async_op: bool, timeout_s: float | None) -> None:
        self.work: Work | None = None
        self.sources: list[int] = []
        self._calls = calls
        self._async_op = async_op
        self._timeout_s = timeout_s
        self._pending: list[tuple[bool, Any, int | None, int]] = []
        self._is_over = False

    def send(self, tensor: Any, dst: int, tag: int = 0) -> None:
        """As :meth:`Messages.send`, when the block ends."""
        self._add("send", (True, tensor, dst, tag))

    def recv(self, tensor: Any, src: int | None = None, tag: int = 0) -> None:
        """As :meth:`Messages.recv`, when the block ends."""
        self._add("recv", (False, tensor, src, tag))

    def _add(self, name: str, message: tuple[bool, Any, int | None, int]) -> None:
        if self._is_over:
            raise PycommError(
                f"batch.{name}: its block has ended, so nothing would start this message: call it inside the block, "
                f"or open another one with comm.batch()"
            )
        self._pending.append(message)

    def __enter__(self) -> Batch:
        self._is_over = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        pending, self._pending = self._pending, []
        if error is not None:
            return
        outcome = self._calls.exchange(pending, self._async_op, self._timeout_s)
        if isinstance(outcome, list):
            self.sources = outcome
        else:
            self.work = outcome
