"""pycomm's own all-reduce kernels, as the NCCL back end launches them: on this rank, over memory that all ranks map."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pycomm import _C
from pycomm.gpu.grids import NUM_THREADS, ONE_SHOT_BLOCKS, ONE_SHOT_CHUNK, grid_of, one_shot_grid

__all__ = ["Kernels"]

_STAGING_AT = -(-_C.SIGNAL_PAD_BYTES // 4096) * 4096  # behind the signal pad
_SIZES = {1: "uint8", 2: "float16", 4: "float32", 8: "float64"}  # a dtype of each size
# Of a kernel. Those of several communicators may wait at the same time, each for its own peers, and no peer's may be
# kept from starting: so few that a GPU has room for the kernels of four.
_MOST_BLOCKS = 32


class Kernels:
    """The kernels of one rank. They run one after the other, which whoever launches them sees to.

    Args:
        memory: :meth:`memory_bytes` of each rank, for this group alone.
        num_multiprocessors: the least of any rank: grids are the same on all.
        timeout_s: of each wait of a kernel for another rank.
    """

    def __init__(
        self, memory: _C.GpuMemory, device: torch.device, rank: int, num_multiprocessors: int, timeout_s: float
    ) -> None:
        self._rank = rank
        self._group = _C.RankGroup(memory, device.index, [rank], timeout_s)
        self._most_blocks = min(_MOST_BLOCKS, num_multiprocessors)
        self._staging = [memory.part(peer) + _STAGING_AT for peer in range(memory.world_size)]
        self._staging_bytes = memory.bytes - _STAGING_AT
        self.abort_word = self._group.abort_word(rank)
        self.status = self._group.status(rank)

    @staticmethod
    def memory_bytes(one_shot_bytes: int, num_multiprocessors: int) -> int:
        """Of signal pad and staging, for one-shot all-reduces of up to ``one_shot_bytes``."""
        grid = (min(ONE_SHOT_BLOCKS, _MOST_BLOCKS, num_multiprocessors), NUM_THREADS)
        return _STAGING_AT + max(
            _C.RankGroup.staging_bytes(name, max(one_shot_bytes // size, 1), ONE_SHOT_CHUNK, grid)
            for size, name in _SIZES.items()
        )

    def launch(self, kernel: str, data: Sequence[int], count: int, dtype: str, op: str, stream: int) -> None:
        """All-reduce in place, by the kernel of that name. ``data``: this rank's tensor, or every rank's, by rank."""
        {"one_shot": self._one_shot, "two_shot": self._two_shot}[kernel](data, count, dtype, op, stream)

    def _one_shot(self, data: Sequence[int], count: int, dtype: str, op: str, stream: int) -> None:
        (tensor,) = data
        grid = one_shot_grid(count, self._most_blocks)
        self._group.all_reduce_one_shot(
            self._rank,
            dtype,
            dtype,
            op,
            count,
            ONE_SHOT_CHUNK,
            tensor,
            tensor,
            self._staging,
            self._staging_bytes,
            grid,
            stream,
        )

    def _two_shot(self, data: Sequence[int], count: int, dtype: str, op: str, stream: int) -> None:
        grid = grid_of(count, self._most_blocks)
        self._group.all_reduce_two_shot(self._rank, dtype, op, count, data, [], grid, stream)
