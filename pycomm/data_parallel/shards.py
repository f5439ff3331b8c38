"""Who owns what: each rank owns a run of whole norm blocks of every parameter.

A pure function of shapes, so that it depends neither on buckets nor on their order, and optimizer states never move.
Blocks are cut from each parameter's start, in the order of its memory; their squared norms are added in (parameter,
block) order, which makes a norm independent of buckets and shards.

Ref: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020).
"""

from __future__ import annotations

from dataclasses import dataclass

from pycomm import _C

NORM_BLOCK = _C.NORM_BLOCK  # elements

Row = tuple[int, int, int, int, int, int]  # of csrc/host/gradient_step.hpp: Run


@dataclass(frozen=True)
class Shard:
    """Elements [begin, end) of a parameter, at ``packed`` among all that its rank owns of these dtypes."""

    begin: int
    end: int
    packed: int

    def __len__(self) -> int:
        return self.end - self.begin


def num_blocks(numel: int) -> int:
    return -(-numel // NORM_BLOCK)


def owned(numel: int, turn: int, rank: int, world_size: int) -> tuple[int, int]:
    """The elements [begin, end) of a parameter that ``rank`` owns.

    Chunks go round by ``turn``, usually the parameter's number in the model: the many parameters of a single block fall
    on different ranks.
    """
    chunk = (rank + turn) % world_size
    blocks = num_blocks(numel)
    begin, end = blocks * chunk // world_size, blocks * (chunk + 1) // world_size
    return min(numel, begin * NORM_BLOCK), min(numel, end * NORM_BLOCK)


def row(shard: Shard, first_block: int, *, grad: int = 0, param: int = 0, group: int = 0) -> Row:
    """A run; ``grad`` and ``param`` are where the whole parameter starts in the bucket and in its buffer."""
    return (
        grad + shard.begin,
        param + shard.begin,
        shard.packed,
        len(shard),
        first_block + shard.begin // NORM_BLOCK,
        group,
    )
