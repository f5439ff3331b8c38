"""How activations and gradients get from one stage to the next over a Communicator.

On the host transport they pass through slots (``slots.py``) once the first step has shown how large they are. Else, and
for a tensor that is larger than its slot, they are messages: a token (``tokens.py``), then the tensor.

Messages do not block their sender and wait in the transport, so the order in which a rank wants them is free. With
``ordered`` everything is a message, and blocks: each send returns when it is matched, and a group is one batch, as on
one stream of NCCL.
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


class Links:
    """This rank's ends of all links of a schedule.

    Args:
        comm: the pipeline's ranks.
        rank_of: stage -> rank.
        slots: link -> slots that it gets.
        ordered: see the module.
    """

    def __init__(self, comm: Communicator, rank_of: Sequence[int], slots: Mapping[Link, int], ordered: bool) -> None:
        self._comm = comm
        self._rank_of = rank_of
        self._counts = slots
        self._wants_slots = bool(slots) and not ordered and comm.backend == "shm"
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

    def exchange(self, sends: Sequence[tuple[Action, Tensor, int]], receives: Sequence[Action]) -> list[Arrived]:
        """Send and receive what a step of the schedule says, and return when all of it is done."""
        outgoing = [(*self._route(action), tensor.contiguous(), rows) for action, tensor, rows in sends]
        incoming = [self._route(action) for action in receives]
        numbers = [torch.empty(TOKEN, dtype=torch.int64, device=self._comm.device) for _ in receives]
        with self._comm.batch() as batch:
            for peer, link, tensor, rows in outgoing:
                batch.send(self._token(link, tensor, rows), peer, _tag(link, _TOKENS))
            for (peer, link), token in zip(incoming, numbers, strict=True):
                batch.recv(token, peer, _tag(link, _TOKENS))
        tokens = [unpack(token.tolist()) for token in numbers]
        rooms = [self._room(token) for token in tokens]
        with self._comm.batch() as batch:
            for peer, link, tensor, _ in outgoing:
                batch.send(tensor, peer, _tag(link, _DATA))
            for (peer, link), room in zip(incoming, rooms, strict=True):
                batch.recv(room, peer, _tag(link, _DATA))
        arrived = zip(rooms, tokens, incoming, strict=True)
        return [Arrived(room, token, link) for room, token, (_, link) in arrived]

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
