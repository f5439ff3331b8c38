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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.errors import MismatchError
from pycomm.tensor_parallel.products import shown

__all__ = ["Turn", "Workspace"]

_NUM_SLOTS = 3
_LINE = 8  # int64 words of a cache line: flags of different turns' phases do not share one
_DESCRIPTOR = 8  # words
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
        self.flags = [pad[i * _LINE : i * _LINE + 1] for i in range(2)]
        self._descriptors = [
            [peer[(2 + slot) * _LINE :][:_DESCRIPTOR].numpy() for peer in comm.peers(pad)] for slot in range(_NUM_SLOTS)
        ]
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
        self._descriptors[slot][comm.rank][: len(descriptor)] = descriptor
        turn = Turn(self, comm, describe, len(descriptor), self._num_turns)
        turn.post()
        return turn

    def descriptors(self, turn: int, length: int) -> list[list[int]]:
        return [words[:length].tolist() for words in self._descriptors[turn % _NUM_SLOTS]]

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
        self, workspace: Workspace, comm: Communicator, describe: Callable[[Sequence[int]], str], length: int, turn: int
    ) -> None:
        self._workspace, self._comm, self._describe, self._length, self._turn = workspace, comm, describe, length, turn
        self._base = turn << _PHASE_BITS
        self._posted = [0, 0]

    def post(self, flag: int = 0) -> None:
        """This rank has come one step further."""
        self.post_until(self._posted[flag] + 1, flag)

    def post_until(self, count: int, flag: int = 0) -> None:
        """This rank has come as far as with ``count`` posts."""
        self._posted[flag] = count
        self._comm.post(self._workspace.flags[flag], self._base + count)

    def wait(self, count: int, flag: int = 0) -> None:
        """Wait until every rank has posted ``count`` times in this turn."""
        with shown("pycomm::wait"):
            self._comm.wait_posted(self._workspace.flags[flag], self._base + count)

    def descriptors(self) -> list[list[int]]:
        """What every rank has called, by rank. Waits for them to begin."""
        self.wait(1)
        return self._workspace.descriptors(self._turn, self._length)

    def check_equal(self, *, ignore: int | None = None) -> list[list[int]]:
        """The descriptors, which may differ in the word ``ignore`` only.

        Raises:
            MismatchError: they differ otherwise; on every rank, and the communicator stays usable.
        """
        found = self.descriptors()
        keys = [[word for i, word in enumerate(words) if i != ignore] for words in found]
        if any(key != keys[0] for key in keys):
            calls = {rank: self._describe(words) for rank, words in enumerate(found)}
            text = "; ".join(f"rank {rank} {call}" for rank, call in calls.items())
            raise MismatchError(f"ranks of group {self._comm.name!r} called different things: {text}", calls=calls)
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
