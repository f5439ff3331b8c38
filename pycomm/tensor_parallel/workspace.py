"""Symmetric memory that the fused operations of a communicator work in, and how they take turns in it.

An operation is one *turn*. Ranks do not meet at its start or end: each posts how far it has come and waits for what it
needs, so that a rank that is late delays its peers only where they use its data.

    begin        write the descriptor (what is called, with which sizes), post it
    reserve      grow the buffer if it is too small: collective, and the same decision on every rank
    work         write into the own buffer, post; wait for the peers' posts, read their buffers

Why nobody overwrites what a peer still reads: a turn ends on a rank after it has waited for the last post of every peer
in it. Turn t uses buffer and descriptor t % 3. A rank that starts turn t has finished turn t - 1, hence every peer has
posted in t - 1. At most two turns are open at once (one inside the other), so that peer has finished turn t - 3, the
last that used the same memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.tensor_parallel.descriptors import same_calls
from pycomm.tensor_parallel.products import shown

__all__ = ["Turn", "Workspace"]

_NUM_SLOTS = 3
_ZEROS = (0,) * 8
_LINE = 8  # int64 words of a cache line: flags of different turns' phases do not share one
_DESCRIPTOR = struct.Struct("=8q")  # one line
_PHASE_BITS = 20  # posts of one turn
_PAGE = 4096
_MAX_LAYOUTS = 256  # a buffer's; more shapes than that are rare, and then all are made again

_Layout = TypeVar("_Layout")


@dataclass
class _Buffer:
    own: Tensor  # uint8
    peers: list[Tensor]  # everyone's, by rank


class Workspace:
    """One rank's end. Making it is collective.

    It holds at most three buffers, each as large as the largest operation's so far.
    """

    def __init__(self, comm: Communicator) -> None:
        pad = comm.empty((2 + _NUM_SLOTS) * _LINE, dtype=torch.int64)
        pad.zero_()
        comm.barrier()  # no peer posts before everyone has cleared its flags
        self.flags = [comm.flag(pad[i * _LINE : i * _LINE + 1]) for i in range(2)]
        lines = [peer.numpy().data.cast("B") for peer in comm.peers(pad)]
        places = [slice((2 + slot) * _LINE * 8, (3 + slot) * _LINE * 8) for slot in range(_NUM_SLOTS)]
        self._descriptors = [[line[place] for line in lines] for place in places]  # [slot][rank]
        self._buffers: list[_Buffer | None] = [None] * _NUM_SLOTS
        self._layouts: list[dict[Hashable, object]] = [{} for _ in range(_NUM_SLOTS)]
        self._num_turns = 0

    def begin(self, comm: Communicator, describe: Callable[[Sequence[int]], str], *descriptor: int) -> Turn:
        """Start a turn.

        Args:
            comm: the communicator of this workspace.
            describe: names the call that a descriptor stands for, for errors.
            descriptor: up to 8 numbers that say what this rank calls.
        """
        self._num_turns += 1
        slot = self._num_turns % _NUM_SLOTS
        _DESCRIPTOR.pack_into(self._descriptors[slot][comm.rank], 0, *descriptor, *_ZEROS[len(descriptor) :])
        turn = Turn(self, comm, describe, self._num_turns)
        turn.post()
        return turn

    def descriptors(self, turn: int) -> list[tuple[int, ...]]:
        lines = self._descriptors[turn % _NUM_SLOTS]
        if all(line == lines[0] for line in lines):
            return [_DESCRIPTOR.unpack(lines[0])] * len(lines)
        return [_DESCRIPTOR.unpack(line) for line in lines]

    def capacity(self, turn: int) -> int:
        buffer = self._buffers[turn % _NUM_SLOTS]
        return -1 if buffer is None else buffer.own.numel()

    def grow(self, comm: Communicator, turn: int, num_bytes: int) -> None:
        own = comm.empty((num_bytes // _PAGE + 1) * _PAGE, dtype=torch.uint8)
        self._buffers[turn % _NUM_SLOTS] = _Buffer(own, comm.peers(own))
        self._layouts[turn % _NUM_SLOTS].clear()  # they are views of the old buffer

    def layouts(self, turn: int) -> dict[Hashable, object]:
        return self._layouts[turn % _NUM_SLOTS]

    def buffer(self, turn: int) -> _Buffer:
        buffer = self._buffers[turn % _NUM_SLOTS]
        assert buffer is not None
        return buffer


class Turn:
    """One operation in a workspace; see the module.

    Its posts are numbered from 1, the descriptor's. There is a second flag with numbers of its own, for operations
    whose phases overtake each other.
    """

    def __init__(
        self, workspace: Workspace, comm: Communicator, describe: Callable[[Sequence[int]], str], turn: int
    ) -> None:
        self._workspace, self._comm, self._describe, self._turn = workspace, comm, describe, turn
        self._base = turn << _PHASE_BITS
        self._posted = [0, 0]

    def post(self, flag: int = 0) -> None:
        """This rank has come one step further."""
        self.post_until(self._posted[flag] + 1, flag)

    def post_until(self, count: int, flag: int = 0) -> None:
        """This rank has come as far as with ``count`` posts."""
        self._posted[flag] = count
        self._workspace.flags[flag].post(self._base + count)

    def wait(self, count: int, flag: int = 0) -> None:
        """Wait until every rank has posted ``count`` times in this turn."""
        with shown("pycomm::wait"):
            self._workspace.flags[flag].wait(self._base + count)

    def check_equal(self, *, ignore: int | None = None) -> list[tuple[int, ...]]:
        """Every rank's descriptor, by rank, which may differ in the word ``ignore`` only. Waits for them to begin.

        Raises:
            MismatchError: they differ otherwise; on every rank, and the communicator stays usable.
        """
        self.wait(1)
        found = self._workspace.descriptors(self._turn)
        same_calls(self._comm.name, found, self._describe, ignore)
        return found

    def fits(self, num_bytes: int) -> bool:
        return num_bytes <= self._workspace.capacity(self._turn)

    def grow(self, num_bytes: int) -> None:
        """Collective: every rank asks for the same size, having seen that it does not fit."""
        self._workspace.grow(self._comm, self._turn, num_bytes)

    def layout(self, key: Hashable, make: Callable[[], _Layout]) -> _Layout:
        """``make()``, kept for later turns in the same buffer: views of it, which cost more than a small product.

        Args:
            key: everything that the layout depends on besides the buffer.
        """
        kept = self._workspace.layouts(self._turn)
        found = kept.get(key)
        if found is None:
            if len(kept) >= _MAX_LAYOUTS:
                kept.clear()
            found = kept[key] = make()
        return found  # type: ignore[return-value]

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The start of ``rank``'s buffer as a tensor."""
        memory = self._workspace.buffer(self._turn).peers[rank]
        return self.layout((rank, tuple(shape), dtype), lambda: _view(memory, shape, dtype))


def _view(memory: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
