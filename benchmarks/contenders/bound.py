"""The bound: pycomm's own vectorised reduction as a plain loop over shared buffers, without one flag in the timing.

Rank r reduces slice r of everyone's buffer and writes the result to everyone (push two-shot, in place). Nothing tells
a rank when its peers are done: a barrier before and one after, both untimed, take the place of the flags that a real
all-reduce needs. README.md says why nothing on shared memory can be faster than this.
"""

from __future__ import annotations

import torch

from contenders.base import Run
from contenders.pycomm_ import Pycomm
from pycomm import _C

_LINE_BYTES = 64  # slices end on cache lines, or two ranks would write to one


class Bound(Pycomm):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size, symmetric=True)

    def version(self) -> str:
        return f"push two-shot loop, SIMD {_C.simd_level()}, no flags"

    def all_reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        line = _LINE_BYTES // output.itemsize
        num_lines = -(-output.numel() // line)
        first, last = (min(num_lines * r // self.world_size * line, output.numel()) for r in (self.rank, self.rank + 1))
        if first == last:
            return lambda: None
        buffers = [peer.data_ptr() + first * output.itemsize for peer in self._comm.peers(output)]
        reduce, dtype, count = _C.reduce, str(output.dtype).removeprefix("torch."), last - first
        return lambda: reduce(dtype, "sum", buffers, buffers, count)

    def settle(self) -> None:
        self._comm.barrier()
