"""How many blocks and threads kernels get: the same on every rank of a group, since block b of one meets block b of all
others. Functions of what all ranks know."""

from __future__ import annotations

from pycomm import _C

__all__ = ["NUM_THREADS", "ONE_SHOT_BLOCKS", "ONE_SHOT_CHUNK", "Grid", "grid_of", "one_shot_grid"]

Grid = tuple[int, int]  # blocks, threads a block

NUM_THREADS = _C.MAX_KERNEL_THREADS
ONE_SHOT_BLOCKS = _C.ONE_SHOT_BLOCKS
ONE_SHOT_CHUNK = 256  # elements of a warp: small tensors over many warps


def grid_of(count: int, most_blocks: int) -> Grid:
    """For ``count`` elements: a warp a chunk, up to ``most_blocks``."""
    chunks = -(-count // _C.CHUNK_ELEMENTS)
    return max(1, min(most_blocks, -(-chunks * 32 // NUM_THREADS))), NUM_THREADS


def one_shot_grid(count: int, most_blocks: int, num_blocks: int | None = None) -> Grid:
    """Of a one-shot all-reduce: few blocks, no more warps than there are small chunks."""
    warps = -(-count // ONE_SHOT_CHUNK)
    blocks = num_blocks or max(1, min(most_blocks, ONE_SHOT_BLOCKS, -(-warps * 32 // NUM_THREADS)))
    return blocks, min(NUM_THREADS, max(32, 32 * -(-warps // blocks)))
