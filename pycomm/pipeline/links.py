"""How activations and gradients get from one stage to the next over a Communicator.

On the host transport they pass through *slots* once the first step has shown how large they are: memory that both ranks
map. Else, and for a tensor that is larger than its slot, they are messages: a *token*, which describes the tensor, then
the tensor.

Messages do not block their sender and wait in the transport, so the order in which a rank wants them is free. With
``ordered`` everything is a message, and blocks: each send returns when it is matched, and a group is one batch, as on
one stream of NCCL.

On NCCL itself, messages are always in order. Tokens would make the host wait for the GPU, so the first step and the
first evaluation alone have them. From then on micro-batches keep their shapes, and transfers run on the communicator's
stream beside the computation, which waits for a tensor where it uses it.

For each link its sender has some slots, and a ring of tokens, which name slots. To send is to copy the tensor into a
free slot, write the next token and count up the link's ``sent`` flag; the receiver waits for the flag and computes on
the mapped slot. After its last use the receiver writes the slot's number into a ring of its own and counts up
``freed``. There are no messages, and nobody waits but for a tensor or a slot that is not there yet.

Rings have one place a slot. The sender overwrites a token only when a slot was freed whose tensor came no earlier than
the token's; the receiver reads tokens in order, so it has read that one. The receiver overwrites the number of a freed
slot only when as many others were freed since, which needs that the sender has used that slot again. Flags are written
after what they announce, and whoever has waited for one sees all of that (:meth:`pycomm.communicator.Flag.wait`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pycomm.arguments import MOVED
from pycomm.communicator import Communicator, Flag, Work
from pycomm.pipeline.actions import Action, mate

__all__ = ["Arrived", "Links", "check_sendable"]

_MAX_DIMS = 8
TOKEN = 5 + _MAX_DIMS  # int64: slot, whether the tensor follows as a message, rows, dtype, dimensions, sizes
_ALIGN = 64  # bytes: a slot or a flag shares no cache line
_FLAG = _ALIGN // 8
_TOKENS, _DATA, _NUM_PURPOSES = 0, 1, 2

Link = tuple[str, int]  # kind of the receive and the stage that receives
Key = tuple[str, int, int]
Outgoing = tuple[Action, Tensor, int]  # the SEND, what it sends, the micro-batch's rows


class Token(NamedTuple):
    """A tensor, its micro-batch's rows, the slot that it takes, and whether it is there or follows as a message."""

    slot: int
    is_apart: bool
    rows: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass
class Arrived:
    """A tensor that came over ``link``; its memory may be a slot of the sender's.

    With ``work`` it comes on another stream, and ``work.wait()`` stands before its use.
    """

    tensor: Tensor
    token: Token
    link: Link
    work: Work | None = None


def pack(tensor: Tensor, rows: int, *, slot: int = 0, is_apart: bool = True) -> list[int]:
    """The token of ``tensor`` as [TOKEN] integers."""
    padding = [0] * (_MAX_DIMS - tensor.ndim)
    return [slot, int(is_apart), rows, MOVED.index(tensor.dtype), tensor.ndim, *tensor.shape, *padding]


def unpack(numbers: list[int]) -> Token:
    slot, is_apart, rows, dtype, ndim, *sizes = numbers
    return Token(slot, bool(is_apart), rows, MOVED[dtype], torch.Size(sizes[:ndim]))


def check_sendable(tensor: object, what: str) -> None:
    """Raise TypeError or ValueError, with ``what`` in front, unless a token can describe ``tensor``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} is {type(tensor).__name__}: a stage takes one tensor and returns one")
    if tensor.dtype not in MOVED or tensor.ndim > _MAX_DIMS:
        raise ValueError(f"{what} is {tensor.dtype} with {tensor.ndim} dimensions: it cannot be sent to another stage")


def sending_stage(link: Link) -> int:
    kind, stage = link
    return stage - 1 if kind == "RECV_F" else stage + 1


@dataclass
class _End:
    """This rank's end of a link."""

    peer: int
    sent: Flag
    freed: Flag
    tokens: list[Tensor]  # of the sender, mapped
    freed_slots: Tensor  # of the receiver, mapped
    slots: list[Tensor]  # of the sender, mapped: [bytes]
    views: dict[tuple[int, torch.dtype, torch.Size], Tensor] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    written: list[list[int]] = field(default_factory=list)  # what is in the tokens
    num_sent: int = 0
    num_freed: int = 0

    def view(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        key = slot, dtype, shape
        if key not in self.views:
            num_bytes = shape.numel() * dtype.itemsize
            self.views[key] = self.slots[slot][:num_bytes].view(dtype).view(shape)
        return self.views[key]


class Slots:
    """All slots of a pipeline's ranks. Making them is collective.

    Args:
        comm: the pipeline's ranks.
        rank_of: stage -> rank.
        counts: link -> how many slots it gets; the same on all ranks.
        bytes_of: of each link that this rank sends on, the largest tensor that a slot shall hold.
    """

    def __init__(
        self, comm: Communicator, rank_of: Sequence[int], counts: Mapping[Link, int], bytes_of: Mapping[Link, int]
    ) -> None:
        links = sorted(counts)
        sizes = torch.tensor([bytes_of.get(link, 0) for link in links])
        comm.all_reduce(sizes, op="max")
        aligned = {link: -(-size // _ALIGN) * _ALIGN for link, size in zip(links, sizes.tolist(), strict=True)}
        flags = comm.empty(len(links), 2, _FLAG, dtype=torch.int64).zero_()
        # Every rank has room for the tokens and freed slots of all links, which is little, and for its own slots.
        tokens, freed_slots = (
            comm.empty(sum(counts.values()), width, dtype=torch.int64).zero_() for width in (TOKEN, _FLAG)
        )
        sent_bytes = [0] * comm.world_size
        for link in links:
            sent_bytes[rank_of[sending_stage(link)]] += aligned[link] * counts[link]
        memory = comm.empty(max(1, *sent_bytes), dtype=torch.uint8)
        mapped = [comm.peers(tensor) for tensor in (tokens, freed_slots, memory)]
        self._kept = (flags, tokens, freed_slots, memory)  # peers refer to them
        self._ends: dict[Link, _End] = {}
        place = 0
        used = [0] * comm.world_size
        for number, link in enumerate(links):
            sender, receiver = rank_of[sending_stage(link)], rank_of[link[1]]
            rows = range(place, place := place + counts[link])
            starts = [used[sender] + aligned[link] * n for n in range(counts[link])]
            used[sender] += aligned[link] * counts[link]
            if comm.rank in (sender, receiver):
                self._ends[link] = _End(
                    peer=receiver if comm.rank == sender else sender,
                    sent=comm.flag(flags[number, 0, :1]),
                    freed=comm.flag(flags[number, 1, :1]),
                    tokens=[mapped[0][sender][row] for row in rows],
                    freed_slots=mapped[1][receiver][rows.start : rows.stop, 0],
                    slots=[mapped[2][sender][start : start + aligned[link]] for start in starts],
                    free=list(range(counts[link]))[::-1],
                    written=[[] for _ in rows],
                )
        comm.barrier()  # all flags are zero

    def send(self, link: Link, tensor: Tensor, rows: int) -> bool:
        """Hand ``tensor`` over, which may be changed at once. False: it is too large, and follows as a message."""
        end = self._ends[link]
        while not end.free:
            end.freed.wait(end.num_freed + 1, rank=end.peer)
            end.free.append(int(end.freed_slots[end.num_freed % len(end.slots)]))
            end.num_freed += 1
        slot = end.free.pop()
        fits = tensor.numel() * tensor.element_size() <= len(end.slots[slot])
        token = pack(tensor, rows, slot=slot, is_apart=not fits)
        at = end.num_sent % len(end.slots)
        if end.written[at] != token:
            end.tokens[at].copy_(torch.tensor(token))
            end.written[at] = token
        if fits:
            end.view(slot, tensor.dtype, tensor.shape).copy_(tensor)
        end.num_sent += 1
        end.sent.post(end.num_sent)
        return fits

    def recv(self, link: Link) -> tuple[Tensor | None, Token]:
        """Wait for the next tensor; None: it follows as a message."""
        end = self._ends[link]
        end.sent.wait(end.num_sent + 1, rank=end.peer)
        token = unpack(end.tokens[end.num_sent % len(end.slots)].tolist())
        end.num_sent += 1
        return None if token.is_apart else end.view(token.slot, token.dtype, token.shape), token

    def release(self, arrived: Arrived) -> None:
        """The slot is not needed here any more."""
        end = self._ends[arrived.link]
        end.freed_slots[end.num_freed % len(end.slots)] = arrived.token.slot
        end.num_freed += 1
        end.freed.post(end.num_freed)


class Links:
    """This rank's ends of all links of a schedule.

    Args:
        comm: the pipeline's ranks.
        rank_of: stage -> rank.
        slots: link -> slots that it gets.
        ordered: see the module; so it is on NCCL, whatever is said here.

    Attributes:
        is_ordered: what came of it.
    """

    def __init__(self, comm: Communicator, rank_of: Sequence[int], slots: Mapping[Link, int], ordered: bool) -> None:
        self._comm = comm
        self._rank_of = rank_of
        self._counts = slots
        self._fixes_shapes = comm.capabilities.orders_on_device
        self.is_ordered = ordered or self._fixes_shapes
        # By whether gradients are wanted: what each transfer of a step, or of an evaluation, was the first time.
        self._known: dict[bool, dict[Key, Token]] = {}
        self._wants_slots = bool(slots) and not ordered and comm.capabilities.has_flags
        self._slots: Slots | None = None
        self._works: list[Work] = []
        self._largest: dict[Link, int] = {}  # bytes of what was sent

    def send(self, action: Action, tensor: Tensor, rows: int) -> None:
        """Hand ``tensor`` to the next or previous stage; it may be changed after :meth:`settle`, or freed at once."""
        peer, link = self._route(action)
        if self._slots is not None and self._slots.send(link, tensor, rows):
            return
        parts = [(_DATA, tensor.contiguous())]
        if self._slots is None:
            parts.insert(0, (_TOKENS, self._token(link, tensor, rows)))
        for purpose, part in parts:
            work = self._comm.send(part, peer, _tag(link, purpose), async_op=True)
            assert work is not None
            self._works.append(work)

    def recv(self, action: Action) -> Arrived:
        """Wait for what ``action`` receives."""
        peer, link = self._route(action)
        if self._slots is not None:
            tensor, token = self._slots.recv(link)
        else:
            numbers = torch.empty(TOKEN, dtype=torch.int64, device=self._comm.device)
            self._comm.recv(numbers, peer, _tag(link, _TOKENS))
            tensor, token = None, unpack(numbers.tolist())
        if tensor is None:
            tensor = self._room(token)
            self._comm.recv(tensor, peer, _tag(link, _DATA))
        return Arrived(tensor, token, link)

    def send_and_receive(self, sends: Sequence[Outgoing], receives: Sequence[Action]) -> list[Arrived]:
        """Send and receive what a step of the schedule says, and return when all of it is done, or enqueued.

        Raises:
            ValueError: on NCCL a tensor is not what it was the first time.
        """
        if not self._fixes_shapes:
            return self._transfer(sends, receives, self._negotiate(sends, receives))
        known = self._known.setdefault(torch.is_grad_enabled(), {})
        given = {action.key: unpack(pack(tensor, rows)) for action, tensor, rows in sends}
        wanted = [action.key for action in receives]
        if not known.keys() >= {*given, *wanted}:
            known |= given | dict(zip(wanted, self._negotiate(sends, receives), strict=True))
        for key, now in given.items():
            before = known[key]
            if now != before:
                raise ValueError(
                    f"{Action(*key)} is {now.dtype} {list(now.shape)} of {now.rows} rows, the first time it was "
                    f"{before.dtype} {list(before.shape)} of {before.rows}: on NCCL batches keep their shape; make "
                    f"another Pipeline for another one"
                )
        return self._transfer(sends, receives, [known[key] for key in wanted])

    def _negotiate(self, sends: Sequence[Outgoing], receives: Sequence[Action]) -> list[Token]:
        """What the receives will be."""
        numbers = [torch.empty(TOKEN, dtype=torch.int64, device=self._comm.device) for _ in receives]
        with self._comm.batch() as batch:
            for action, tensor, rows in sends:
                peer, link = self._route(action)
                batch.send(self._token(link, tensor, rows), peer, _tag(link, _TOKENS))
            for action, token in zip(receives, numbers, strict=True):
                peer, link = self._route(action)
                batch.recv(token, peer, _tag(link, _TOKENS))
        return [unpack(token.tolist()) for token in numbers]

    def _transfer(
        self, sends: Sequence[Outgoing], receives: Sequence[Action], tokens: Sequence[Token]
    ) -> list[Arrived]:
        rooms = [self._room(token) for token in tokens]
        links = [self._route(action)[1] for action in receives]
        with self._comm.batch(async_op=self._fixes_shapes) as batch:
            for action, tensor, _ in sends:
                peer, link = self._route(action)
                batch.send(tensor.contiguous(), peer, _tag(link, _DATA))
            for action, room in zip(receives, rooms, strict=True):
                peer, link = self._route(action)
                batch.recv(room, peer, _tag(link, _DATA))
        if batch.work is not None:
            self._works.append(batch.work)
        return [Arrived(room, token, link, batch.work) for room, token, link in zip(rooms, tokens, links, strict=True)]

    def release(self, arrived: Arrived) -> None:
        """The tensor's memory is not needed here any more."""
        if self._slots is not None:
            self._slots.release(arrived)

    def settle(self) -> None:
        """End of a step: messages that were sent have arrived."""
        for work in self._works:
            work.wait()
        self._works.clear()

    def end_first_step(self) -> None:
        """Make slots for tensors as large as those that were sent so far. Collective, the first time."""
        if self._wants_slots and self._slots is None:
            self._slots = Slots(self._comm, self._rank_of, self._counts, self._largest)

    def _route(self, action: Action) -> tuple[int, Link]:
        other = mate(action)
        receive = other if action.kind.startswith("SEND") else action
        return self._rank_of[other[1]], (receive[0], receive[1])

    def _token(self, link: Link, tensor: Tensor, rows: int) -> Tensor:
        self._largest[link] = max(tensor.numel() * tensor.element_size(), self._largest.get(link, 0))
        return torch.tensor(pack(tensor, rows), device=self._comm.device)

    def _room(self, token: Token) -> Tensor:
        return torch.empty(token.shape, dtype=token.dtype, device=self._comm.device)


def _tag(link: Link, purpose: int) -> int:
    """Below zero, so that messages of the user on the same communicator, with the usual tags, do not meet these."""
    kind, stage = link
    return -1 - ((stage * 2 + (kind == "RECV_B")) * _NUM_PURPOSES + purpose)
