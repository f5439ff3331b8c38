"""Slots: tensors pass from stage to stage through memory that both ranks map. Host transport only.

For each link its sender has some slots, and a ring of *tokens*, which describe a tensor and name its slot. To send is
to copy the tensor into a free slot, write the next token and count up the link's ``sent`` flag; the receiver waits for
the flag and computes on the mapped slot. After its last use the receiver writes the slot's number into a ring of its
own and counts up ``freed``. There are no messages, and nobody waits but for a tensor or a slot that is not there yet.

Rings have one place a slot. The sender overwrites a token only when a slot was freed whose tensor came no earlier than
the token's; the receiver reads tokens in order, so it has read that one. The receiver overwrites the number of a freed
slot only when as many others were freed since, which needs that the sender has used that slot again. Flags are written
after what they announce, and whoever has waited for one sees all of that (:meth:`pycomm.communicator.Flag.wait`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pycomm.communicator import Communicator, Flag
from pycomm.pipeline.tokens import TOKEN, Arrived, Link, Token, pack, receiving_stage, sending_stage, unpack

__all__ = ["Slots"]

_ALIGN = 64  # bytes: a slot or a flag shares no cache line
_FLAG = _ALIGN // 8


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
        own = [link for link in links if rank_of[sending_stage(link)] == comm.rank]
        most = torch.tensor([max(1, sum(aligned[link] * counts[link] for link in own))])
        comm.all_reduce(most, op="max")
        memory = comm.empty(int(most), dtype=torch.uint8)
        mapped = [comm.peers(tensor) for tensor in (tokens, freed_slots, memory)]
        self._kept = (flags, tokens, freed_slots, memory)  # peers refer to them
        self._ends: dict[Link, _End] = {}
        place = 0
        used = [0] * comm.world_size
        for number, link in enumerate(links):
            sender, receiver = rank_of[sending_stage(link)], rank_of[receiving_stage(link)]
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
