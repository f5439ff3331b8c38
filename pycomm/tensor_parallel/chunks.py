"""Where the chunks of a fused product lie in the ranks' buffers (``workspace.py``), the same on every rank.

Made once for a shape and kept (``Turn.layout``): slicing costs more than a small product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.tensor_parallel.shards import shard_sizes, start_of
from pycomm.tensor_parallel.workspace import Turn

__all__ = ["ScatteredChunk", "WholeChunk", "num_chunks_of", "scattered", "whole"]

_CHUNK_BYTES = 4 << 20  # of the whole product; smaller chunks cost the product more than waiting costs
_MAX_CHUNKS = 4


def num_chunks_of(num_bytes: int, num_units: int) -> int:
    """A function of sizes that all ranks share, whether they overlap or not."""
    return max(1, min(num_bytes // _CHUNK_BYTES, _MAX_CHUNKS, num_units))


@dataclass(frozen=True)
class ScatteredChunk:
    """One chunk of a reduce_scatter in a buffer.

    Attributes:
        products: for each owner, the successor first, where its rows are in x, and where their product goes.
        place: where this rank's rows are in the result.
        parts: every rank's products of this rank's rows, by rank.
    """

    products: list[tuple[tuple[slice, slice], Tensor]]
    place: tuple[slice, slice]
    parts: list[Tensor]


def scattered(
    turn: Turn, comm: Communicator, shape: tuple[int, int, int], dtype: torch.dtype, num_chunks: int
) -> list[ScatteredChunk]:
    """One sequence is cut along its rows, several into groups of whole ones: either way pieces are contiguous."""
    rank, num_ranks = comm.rank, comm.world_size
    batch, rows, width = shape
    sizes = shard_sizes(rows, num_ranks)
    memory = [turn.view(peer, (math.prod(shape),), dtype) for peer in range(num_ranks)]
    pieces = [_cut(size if batch == 1 else batch, num_chunks) for size in sizes]
    chunks: list[ScatteredChunk] = []
    offset = 0
    for j in range(num_chunks):
        blocks: list[list[Tensor]] = []  # [owner][rank]
        for owner, size in enumerate(sizes):
            low, high = pieces[owner][j]
            block = (1, high - low, width) if batch == 1 else (high - low, size, width)
            count = math.prod(block)
            blocks.append([theirs[offset : offset + count].view(block) for theirs in memory])
            offset += count

        def place(owner: int, first: int, j: int = j) -> tuple[slice, slice]:
            low, high = pieces[owner][j]
            if batch == 1:
                return slice(None), slice(first + low, first + high)
            return slice(low, high), slice(first, first + sizes[owner])

        owners = [(rank + 1 + i) % num_ranks for i in range(num_ranks)]
        products = [(place(owner, start_of(sizes, owner)), blocks[owner][rank]) for owner in owners]
        chunks.append(ScatteredChunk(products, place(rank, 0), blocks[rank]))
    return chunks


@dataclass(frozen=True)
class WholeChunk:
    """One chunk of an all_reduce in a buffer.

    Attributes:
        rows: of x and of the result.
        blocks: every rank's product of these rows, by rank.
        parts: of each block the elements that this rank adds for all.
        sums: for each rank, what it adds: where in the flat result, and where the sum is.
    """

    rows: slice
    blocks: list[Tensor]
    parts: list[Tensor]
    sums: list[tuple[slice, Tensor]]


def whole(
    turn: Turn, comm: Communicator, shape: tuple[int, int], dtype: torch.dtype, num_chunks: int
) -> list[WholeChunk]:
    memory = [turn.view(peer, shape, dtype) for peer in range(comm.world_size)]
    chunks = []
    for low, high in _cut(shape[0], num_chunks):
        sizes = shard_sizes((high - low) * shape[1], comm.world_size)
        starts = [low * shape[1] + start_of(sizes, peer) for peer in range(comm.world_size)]
        flat = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        chunks.append(
            WholeChunk(
                slice(low, high),
                [theirs[low:high] for theirs in memory],
                [theirs.view(-1)[flat[comm.rank]] for theirs in memory],
                [(place, theirs.view(-1)[place]) for place, theirs in zip(flat, memory, strict=True)],
            )
        )
    return chunks


def _cut(total: int, num_pieces: int) -> list[tuple[int, int]]:
    bounds = [total * i // num_pieces for i in range(num_pieces + 1)]
    return list(pairwise(bounds))
