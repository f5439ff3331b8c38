"""Point-to-point messages of a Communicator: send, receive, and batches of both that progress together.

FIFO per (peer, direction, tag) and independent of collectives. docs/algorithms.md says how the bytes travel.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from pycomm.arguments import tensor_on
from pycomm.backends import Message
from pycomm.calls import Calls, Work

__all__ = ["Batch", "Messages"]

_ANY_SOURCE = -1


class Messages(Calls):
    """Messages between two ranks. Tensors are contiguous and of any dtype that collectives move.

    Both sides need one dtype and number of elements: ``MismatchError`` on both otherwise, or on the receiver alone if
    the send had returned.
    """

    def send(
        self, tensor: Any, dst: int, tag: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Send ``tensor`` to rank ``dst``. Returns when it may be changed again, which for large tensors is not before
        ``dst`` receives it.

        Args:
            tag: any integer; matches the receive's.
        """
        tensor = tensor_on(self.device, tensor)
        core = self._backend.send(tensor, self._checked_peer(dst, "dst"), tag, async_op, self._timeout(timeout_s))
        return self._outcome(core, tensor)

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
        tensor = tensor_on(self.device, tensor)
        source = _ANY_SOURCE if src is None else self._checked_peer(src, "src")
        outcome = self._backend.recv(tensor, source, tag, async_op, self._timeout(timeout_s))
        return outcome if isinstance(outcome, int) else self._work(outcome, tensor)

    def batch(self, *, async_op: bool = False, timeout_s: float | None = None) -> Batch:
        """Messages that progress together, so that ranks can exchange without minding whose turn it is::

            with comm.batch() as b:
                b.send(mine, right)
                b.recv(theirs, left)

        They start when the block ends, which waits for all of them, unless ``async_op``: then ``b.work`` is their Work.
        A block that raises starts none.
        """
        return Batch(self, async_op, self._timeout(timeout_s))

    def _message(self, tensor: Any, peer: int | None, tag: int, *, is_send: bool) -> Message:
        tensor = tensor_on(self.device, tensor)
        checked = _ANY_SOURCE if peer is None else self._checked_peer(peer, "dst" if is_send else "src")
        return Message(is_send, tensor, checked, tag)

    def _checked_peer(self, peer: int, name: str) -> int:
        if not 0 <= peer < self.world_size:
            raise ValueError(f"{name} is {peer}, it must be 0 to {self.world_size - 1}")
        return peer


class Batch:
    """See :meth:`Messages.batch`.

    Attributes:
        work: after the block, with ``async_op``: ends when all messages have.
        sources: after the block, without ``async_op``: of each message in order, the rank that sent it.
    """

    def __init__(self, messages: Messages, async_op: bool, timeout_s: float) -> None:
        self.work: Work | None = None
        self.sources: list[int] = []
        self._messages = messages
        self._async_op = async_op
        self._timeout_s = timeout_s
        self._pending: list[Message] = []

    def send(self, tensor: torch.Tensor, dst: int, tag: int = 0) -> None:
        """As :meth:`Messages.send`, when the block ends."""
        self._pending.append(self._messages._message(tensor, dst, tag, is_send=True))

    def recv(self, tensor: torch.Tensor, src: int | None = None, tag: int = 0) -> None:
        """As :meth:`Messages.recv`, when the block ends."""
        self._pending.append(self._messages._message(tensor, src, tag, is_send=False))

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            return
        pending, self._pending = self._pending, []
        outcome = self._messages._backend.exchange(pending, self._async_op, self._timeout_s)
        if isinstance(outcome, list):
            self.sources = outcome
        else:
            self.work = self._messages._work(outcome, *(message.tensor for message in pending))
