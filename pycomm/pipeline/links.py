"""How activations and gradients get from one stage to the next over a Communicator.

A message is a *token*, 96 bytes that describe a tensor and say where it is. On the host transport the tensor lies in
the sender's symmetric memory, in a slot: the sender has copied it there once, and the receiver computes on the mapped
slot. After its last use a *credit* carries the slot back. Without slots (before the first step has shown how large they
must be, for a tensor that is larger than that, or on another transport) the tensor follows its token as a message of
its own.

Messages do not block their sender and wait in the transport, so the order in which a rank wants them is free. With
``ordered`` they do: each send returns when it is matched, and a group is one batch, as on one stream of NCCL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pycomm.communicator import Communicator, Work
from pycomm.pipeline.actions import Action, mate

__all__ = ["Arrived", "Links", "check_sendable"]

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
)
_MAX_DIMS = 8
_TOKEN = 4 + _MAX_DIMS  # int64: offset of the slot (-1: none), rows, dtype, dimensions, sizes
_ALIGN = 64  # bytes
_TOKENS, _DATA, _CREDITS, _NUM_PURPOSES = 0, 1, 2, 3

Link = tuple[str, int]  # kind of the receive and the stage that receives


@dataclass
class Arrived:
    """A tensor that came, on the mapped slot of its sender if ``offset`` is not None, and the micro-batch's rows."""

    tensor: Tensor
    rows: int
    link: Link
    offset: int | None


@dataclass
class _Slots:
    """Of a link, the sender's buffers that nobody uses, as offsets into its memory."""

    bytes_each: int = 0
    free: list[int] = field(default_factory=list)
    num_lent: int = 0


class Links:
    """This rank's ends of all links of a schedule.

    Args:
        comm: the pipeline's ranks.
        rank_of: stage -> rank.
        buffers: link -> slots that it gets.
        ordered: see the module.
    """

    def __init__(self, comm: Communicator, rank_of: Sequence[int], buffers: Mapping[Link, int], ordered: bool) -> None:
        self._comm = comm
        self._rank_of = rank_of
        self._buffers = buffers
        self._ordered = ordered
        self._slots: dict[Link, _Slots] = {
            link: _Slots() for link in buffers if rank_of[_sending_stage(link)] == comm.rank
        }
        self._memory: Tensor | None = None
        self._peers: list[Tensor] = []
        self._works: list[Work] = []

    def send(self, action: Action, tensor: Tensor, rows: int) -> None:
        """Hand ``tensor`` to the next or previous stage; it may be freed, and in a slot also changed, afterwards."""
        token, data = self._pack(action, tensor, rows)
        peer, link = self._route(action)
        for purpose, part in ((_TOKENS, token), (_DATA, data)):
            if part is not None:
                work = self._comm.send(part, peer, _tag(link, purpose), async_op=True)
                assert work is not None
                self._works.append(work)

    def recv(self, action: Action) -> Arrived:
        """Wait for what ``action`` receives."""
        peer, link = self._route(action)
        token = torch.empty(_TOKEN, dtype=torch.int64)
        self._comm.recv(token, peer, _tag(link, _TOKENS))
        arrived = self._unpack(token, peer, link)
        if arrived.offset is None:
            self._comm.recv(arrived.tensor, peer, _tag(link, _DATA))
        return arrived

    def exchange(self, sends: Sequence[tuple[Action, Tensor, int]], receives: Sequence[Action]) -> list[Arrived]:
        """Send and receive what a step of the schedule says, and return when all of it is done."""
        packed = [(*self._route(action), *self._pack(action, tensor, rows)) for action, tensor, rows in sends]
        routes = [self._route(action) for action in receives]
        tokens = [torch.empty(_TOKEN, dtype=torch.int64) for _ in receives]
        with self._comm.batch() as batch:
            for peer, link, token, _ in packed:
                batch.send(token, peer, _tag(link, _TOKENS))
            for (peer, link), token in zip(routes, tokens, strict=True):
                batch.recv(token, peer, _tag(link, _TOKENS))
        arrived = [self._unpack(token, *route) for token, route in zip(tokens, routes, strict=True)]
        with self._comm.batch() as batch:
            for peer, link, _, data in packed:
                if data is not None:
                    batch.send(data, peer, _tag(link, _DATA))
            for (peer, link), item in zip(routes, arrived, strict=True):
                if item.offset is None:
                    batch.recv(item.tensor, peer, _tag(link, _DATA))
        return arrived

    def release(self, arrived: Arrived) -> None:
        """The tensor's memory is not needed here any more."""
        if arrived.offset is None:
            return
        peer = self._rank_of[_sending_stage(arrived.link)]
        credit = torch.tensor([arrived.offset])
        work = self._comm.send(credit, peer, _tag(arrived.link, _CREDITS), async_op=True)
        assert work is not None
        self._works.append(work)

    def settle(self) -> None:
        """End of a step: all that was sent has arrived, and all slots are back."""
        for link, slots in self._slots.items():
            while slots.num_lent:
                self._take_credit(link, slots)
        for work in self._works:
            work.wait()
        self._works.clear()

    def allocate(self, bytes_of: Mapping[Link, int]) -> None:
        """Make slots in symmetric memory. Collective.

        Args:
            bytes_of: of each link that this rank sends on, the largest tensor so far.
        """
        offset = 0
        for link, num_bytes in bytes_of.items():
            each = -(-num_bytes // _ALIGN) * _ALIGN
            self._slots[link] = _Slots(each, [offset + each * n for n in range(self._buffers[link])])
            offset += each * self._buffers[link]
        size = torch.tensor([offset], device=self._comm.device)
        self._comm.all_reduce(size, op="max")
        self._memory = self._comm.empty(int(size), dtype=torch.uint8)
        self._peers = self._comm.peers(self._memory)
        self._comm.barrier()

    def _route(self, action: Action) -> tuple[int, Link]:
        other = mate(action)
        receive = other if action.kind.startswith("SEND") else action
        return self._rank_of[other[1]], (receive[0], receive[1])

    def _pack(self, action: Action, tensor: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
        """The token, and the tensor if it must follow as a message."""
        _, link = self._route(action)
        slots = self._slots[link]
        num_bytes = tensor.numel() * tensor.element_size()
        offset = -1
        if self._memory is not None and num_bytes <= slots.bytes_each:
            while not slots.free:
                self._take_credit(link, slots)
            offset = slots.free.pop()
            slots.num_lent += 1
            _view(self._memory, offset, tensor.dtype, tensor.shape).copy_(tensor)
        sizes = [*tensor.shape, *[0] * (_MAX_DIMS - tensor.ndim)]
        token = torch.tensor([offset, rows, _DTYPES.index(tensor.dtype), tensor.ndim, *sizes])
        return token, tensor.contiguous() if offset < 0 else None

    def _unpack(self, token: Tensor, peer: int, link: Link) -> Arrived:
        offset, rows, dtype, ndim, *sizes = token.tolist()
        shape = torch.Size(sizes[:ndim])
        if offset < 0:
            return Arrived(torch.empty(shape, dtype=_DTYPES[dtype], device=self._comm.device), rows, link, None)
        return Arrived(_view(self._peers[peer], offset, _DTYPES[dtype], shape), rows, link, offset)

    def _take_credit(self, link: Link, slots: _Slots) -> None:
        credit = torch.empty(1, dtype=torch.int64)
        self._comm.recv(credit, self._rank_of[link[1]], _tag(link, _CREDITS))
        slots.free.append(int(credit))
        slots.num_lent -= 1


def check_sendable(tensor: object, what: str) -> None:
    """Raise TypeError or ValueError, with ``what`` in front, unless a token can describe ``tensor``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} is {type(tensor).__name__}: a stage takes one tensor and returns one")
    if tensor.dtype not in _DTYPES or tensor.ndim > _MAX_DIMS:
        raise ValueError(f"{what} is {tensor.dtype} with {tensor.ndim} dimensions: it cannot be sent to another stage")


def _sending_stage(link: Link) -> int:
    kind, stage = link
    return stage - 1 if kind == "RECV_F" else stage + 1


def _tag(link: Link, purpose: int) -> int:
    """Below zero, so that messages of the user on the same communicator, with the usual tags, do not meet these."""
    kind, stage = link
    return -1 - ((stage * 2 + (kind == "RECV_B")) * _NUM_PURPOSES + purpose)


def _view(memory: Tensor, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    num_bytes = shape.numel() * dtype.itemsize
    return memory[offset : offset + num_bytes].view(dtype).view(shape)
