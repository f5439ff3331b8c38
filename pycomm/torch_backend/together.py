"""Messages on a GPU that are enqueued together, since NCCL hangs where two ranks first send to each other and then
receive.

torch tells a process group in Python where a coalesced block starts and ends, but hands it the messages of a
``batch_isend_irecv`` one by one, each as if it stood alone. That function's frame on the stack, and the list of
operations in it, say how many there are.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import torch
import torch.distributed as dist

from pycomm._C import Work
from pycomm.communicator import Communicator

__all__ = ["MessagesTogether"]

Message = tuple[bool, torch.Tensor, int | None, int]  # is it a send, tensor, peer, tag

_BATCH = inspect.unwrap(dist.batch_isend_irecv).__code__
_ITS_LIST = inspect.getfullargspec(inspect.unwrap(dist.batch_isend_irecv)).args[0]
_DEPTH = 4  # frames between it and a group's method: those of isend, and what may be wrapped around it


class MessagesTogether:
    """See the module; for one group, whose messages one thread at a time calls.

    Args:
        comm_of: the communicator for a tensor.
    """

    def __init__(self, comm_of: Callable[[torch.Tensor], Communicator]) -> None:
        self._comm_of = comm_of
        self._coalescing = False
        self._forget(None)

    def add(self, comm: Communicator, message: Message, timeout_s: float) -> Sequence[Work]:
        """Enqueue ``message`` on ``comm``, or keep it for those that come with it.

        Returns:
            Where its Work is by the time that torch gives it to whoever called.
        """
        if self._coalescing:
            self._pending.append(message)
            return self._works
        batch = _calling_batch()
        if batch is not self._batch:
            self._forget(batch)  # of a batch that ended in an error there may be some left
        self._pending.append(message)
        num_together = 1 if batch is None else sum(self._comm_of(op.tensor) is comm for op in batch)
        works = self._works
        if len(self._pending) >= num_together:
            self._enqueue(comm, timeout_s)
        return works

    def start(self) -> None:
        """What comes until :meth:`end` is enqueued together."""
        self._forget(None)
        self._coalescing = True

    def end(self, timeout_s: float) -> None:
        self._coalescing = False
        if self._pending:
            self._enqueue(self._comm_of(self._pending[0][1]), timeout_s)

    def _enqueue(self, comm: Communicator, timeout_s: float) -> None:
        pending, works = self._pending, self._works
        self._forget(None)
        with comm.batch(async_op=True, timeout_s=timeout_s) as batch:
            for is_send, tensor, peer, tag in pending:
                if is_send:
                    assert peer is not None
                    batch.send(tensor, peer, tag)
                else:
                    batch.recv(tensor, peer, tag)
        assert batch.work is not None
        works.append(batch.work)

    def _forget(self, batch: Sequence[dist.P2POp] | None) -> None:
        self._batch = batch
        self._pending: list[Message] = []
        self._works: list[Work] = []


def _calling_batch() -> Sequence[dist.P2POp] | None:
    """The operations of the ``batch_isend_irecv`` that calls; None: a message of its own."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            break
        if frame.f_code is _BATCH:
            operations: Sequence[dist.P2POp] = frame.f_locals[_ITS_LIST]
            return operations
        frame = frame.f_back
    return None
