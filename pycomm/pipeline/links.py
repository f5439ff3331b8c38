"""How activations and gradients get from one stage to the next over a Communicator.

On the host transport they pass through slots (``slots.py``) once the first step has shown how large they are. Else, and
for a tensor that is larger than its slot, they are messages: a token (``tokens.py``), then the tensor.

Messages do not block their sender and wait in the transport, so the order in which a rank wants them is free. With
``ordered`` everything is a message, and blocks: each send returns when it is matched, and a group is one batch, as on
one stream of NCCL.

On NCCL itself, messages are always in order. Tokens would make the host wait for the GPU, so the first step and the
first evaluation alone have them. From then on micro-batches keep their shapes, and transfers run on the communicator's
stream beside the computation, which waits for a tensor where it uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pycomm.communicator import Communicator, Work
from pycomm.pipeline.actions import Action, mate
from pycomm.pipeline.slots import Slots
from pycomm.pipeline.tokens import TOKEN, Arrived, Link, Token, pack, unpack

__all__ = ["Links"]

_TOKENS, _DATA, _NUM_PURPOSES = 0, 1, 2

Key = tuple[str, int, int]
Outgoing = tuple[Action, Tensor, int]  # the SEND, what it sends, the micro-batch's rows


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

    def exchange(self, sends: Sequence[Outgoing], receives: Sequence[Action]) -> list[Arrived]:
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
