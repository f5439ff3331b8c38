"""How a dimension is cut over ranks: by the rule of ``torch.chunk``, which is DTensor's too.

Each rank but the last few has ceil(total / n) of the units, the last one of those the rest, and some may have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Shard", "shard_bounds", "shard_sizes", "start_of"]


def shard_sizes(total: int, num_ranks: int) -> list[int]:
    """Number of units of each rank: ``[4, 4, 2]`` for 10 over 3, ``[1, 1, 0]`` for 2 over 3. Also of symbolic sizes."""
    chunk = (total + num_ranks - 1) // num_ranks
    return [torch.sym_max(0, torch.sym_min(chunk, total - rank * chunk)) for rank in range(num_ranks)]


def start_of(sizes: Sequence[int], rank: int) -> int:
    """Where ``rank``'s part begins."""
    return sum(sizes[:rank])


def shard_bounds(total: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """First unit of ``rank`` and one past its last."""
    sizes = shard_sizes(total, num_ranks)
    start = start_of(sizes, rank)
    return start, start + sizes[rank]


@dataclass(frozen=True)
class Shard:
    """How a parameter of a parallel layer is cut.

    Attributes:
        dim: the dimension that is cut; None: every rank has all of it.
        total: its full size.
        unit: how many of it stay together (a head's width); divides ``total // segments``.
        segments: how many parts of equal size lie one after the other and are cut each for itself (3 where query, key
            and value are stored as one matrix).
    """

    dim: int | None
    total: int = 0
    unit: int = 1
    segments: int = 1

    def __post_init__(self) -> None:
        if self.dim is not None and self.total % (self.segments * self.unit):
            raise ValueError(
                f"dimension {self.dim} of {self.total} is not {self.segments} segment(s) of whole units of {self.unit}"
            )

    def intervals(self, num_ranks: int, rank: int) -> list[tuple[int, int]]:
        """The parts of the full dimension that ``rank`` has: (start, size), one a segment."""
        per_segment = self.total // self.segments
        start, end = shard_bounds(per_segment // self.unit, num_ranks, rank)
        return [(s * per_segment + start * self.unit, (end - start) * self.unit) for s in range(self.segments)]

    def size(self, num_ranks: int, rank: int) -> int:
        """How much of the dimension ``rank`` has."""
        return sum(size for _, size in self.intervals(num_ranks, rank))

    def take(self, full: Tensor, num_ranks: int, rank: int) -> Tensor:
        """A copy of ``rank``'s part of the full tensor."""
        if self.dim is None:
            return full.clone()
        parts = [full.narrow(self.dim, start, size) for start, size in self.intervals(num_ranks, rank)]
        return torch.cat(parts, self.dim)
