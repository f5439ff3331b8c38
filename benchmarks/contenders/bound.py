"""The bounds: plain loops over shared buffers, without one flag in the timing.

Reductions are pycomm's own vectorised kernel, copies are the C library's. Nothing tells a rank when its peers are done:
a barrier before and one after, both untimed, take the place of the flags that a real operation needs. README.md has
the loop of each operation, and why nothing on shared memory can be faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from operations import ROOT, is_sender, peer_of

from contenders.base import Run, nothing
from contenders.pycomm_ import Pycomm
from pycomm import _C

_LINE_BYTES = 64  # slices end on cache lines, or two ranks would write to one


class Bound(Pycomm):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size, symmetric=True)

    def version(self) -> str:
        return f"plain loops, no flags; reductions SIMD {_C.simd_level()}, copies memcpy"

    def unsupported(self, operation: str, dtype: torch.dtype, num_bytes: int) -> str | None:
        if operation == "barrier":
            return "without flags there is no barrier"
        if operation == "scan":
            return "ranks write what others read: there is no scan without flags"
        return super().unsupported(operation, dtype, num_bytes)

    def all_reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        first, last = self._slice(output)
        buffers = self._addresses(output, first)
        return _reduction(output.dtype, buffers, buffers, last - first)

    def reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        first, last = self._slice(output)
        buffers = self._addresses(output, first)
        return _reduction(output.dtype, buffers, [buffers[ROOT]], last - first)

    def reduce_scatter(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        buffers = self._addresses(input, self.rank * output.numel())
        return _reduction(output.dtype, buffers, [output.data_ptr()], output.numel())

    def all_gather(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        targets = self._parts_of_all(output, input.numel())
        return _copies([(target, input) for target in targets])

    def all_to_all(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        sources = self._parts_of_all(input, input.numel() // self.world_size)
        return _copies(list(zip(output.chunk(self.world_size), sources, strict=True)))

    def broadcast(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        first, last = self._slice(output)
        slices = [peer[first:last] for peer in self._comm.peers(output)]
        return _copies([(target, slices[ROOT]) for rank, target in enumerate(slices) if rank != ROOT])

    def gather(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return _copies([(self._parts_of_all(output, input.numel())[ROOT], input)])

    def scatter(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return _copies([(output, self._parts_of_all(input, output.numel())[ROOT])])

    def send(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        peer = peer_of(self.rank, self.world_size)
        if peer is None or is_sender(self.rank):
            return nothing
        return _copies([(output, self._comm.peers(input)[peer])])

    def ping_pong(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        peer = peer_of(self.rank, self.world_size)
        if peer is None or is_sender(self.rank):  # one rank makes both trips: without flags they would overlap
            return nothing
        return _copies([(output, self._comm.peers(input)[peer]), (self._comm.peers(output)[peer], input)])

    def settle(self) -> None:
        self._comm.barrier()

    def _addresses(self, tensor: torch.Tensor, first: int) -> list[int]:
        """Where element ``first`` of every rank's ``tensor`` lies here."""
        return [peer.data_ptr() + first * tensor.itemsize for peer in self._comm.peers(tensor)]

    def _parts_of_all(self, tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Part ``rank``, of ``count`` elements, of every rank's ``tensor``."""
        return [peer[self.rank * count : (self.rank + 1) * count] for peer in self._comm.peers(tensor)]

    def _slice(self, tensor: torch.Tensor) -> tuple[int, int]:
        """This rank's share of the work on ``tensor``: whole cache lines, as equal as they come."""
        line = _LINE_BYTES // tensor.itemsize
        num_lines = -(-tensor.numel() // line)
        first, last = (min(num_lines * r // self.world_size * line, tensor.numel()) for r in (self.rank, self.rank + 1))
        return first, last


def _reduction(dtype: torch.dtype, sources: list[int], targets: list[int], count: int) -> Run:
    if count == 0:
        return nothing
    reduce, name = _C.reduce, str(dtype).removeprefix("torch.")
    return lambda: reduce(name, "sum", sources, targets, count)


def _copies(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Run:
    """The first of each pair is overwritten with the second, through memoryviews: the cheapest memcpy in Python."""
    views = [tuple(tensor.view(torch.uint8).numpy().data for tensor in pair) for pair in pairs]
    copies = [partial(target.__setitem__, slice(None), source) for target, source in views]
    if len(copies) == 1:  # without a loop: at tiny sizes this is all that there is
        return copies[0]

    def copy() -> None:
        for one in copies:
            one()

    return copy
