"""Dropout whose mask depends on an element's place in the whole tensor, not on who computes it.

A mask is a hash of (key, global index): counter-based random numbers. So one process and any number of ranks, each with
its own part, drop the same elements. Keys come from torch's global generator, one number a call, whatever the tensor's
size: ranks that were seeded alike stay alike, and activation checkpointing, which restores that generator, draws the
same mask again.

Ref: Widynski, "Squares: A Fast Counter-Based RNG" (2020), with four rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pycomm.communicator import Communicator
from pycomm.tensor_parallel.functional import sizes_of
from pycomm.tensor_parallel.shards import start_of

__all__ = ["ParallelDropout", "counter_bits", "counter_dropout"]

_LOW_32 = (1 << 32) - 1


def counter_bits(key: Tensor, index: Tensor) -> Tensor:
    """Uniform 32-bit numbers, as int64, one for each index.

    Args:
        key: int64, odd for the best quality; broadcasts.
        index: int64.
    """

    def turned(x: Tensor) -> Tensor:  # swap the halves of 64 bits; >> is arithmetic
        return (x << 32) | ((x >> 32) & _LOW_32)

    x = index * key
    y, z = x.clone(), x + key
    x = turned(x * x + y)
    x = turned(x * x + z)
    x = turned(x * x + y)
    return ((x * x + z) >> 32) & _LOW_32


def counter_dropout(x: Tensor, p: float, key: Tensor, starts: dict[int, tuple[int, int]] | None = None) -> Tensor:
    """Zero each element with probability p and divide the others by 1 - p.

    Args:
        x: this rank's part.
        p: 0 to 1, in steps of 2 ** -32.
        key: int64 scalar tensor; the same on every rank.
        starts: dimension -> (where this rank's part starts, size of the whole), for those that are cut; not negative.
    """
    index = torch.zeros((), dtype=torch.int64, device=x.device)
    for dim, size in enumerate(x.shape):
        start, total = (starts or {}).get(dim, (0, size))
        place = torch.arange(start, start + size, device=x.device)
        index = index * total + place.view(-1, *[1] * (x.dim() - 1 - dim))
    keep = counter_bits(key, index) >= round(p * (1 << 32))
    return x * keep * (1 / (1 - p) if p < 1 else 0.0)


class ParallelDropout(nn.Module):
    """``nn.Dropout`` for activations that ranks have whole, or cut along one dimension by the rule of ``torch.chunk``.

    Ranks need the same state of torch's global CPU generator (``torch.manual_seed``). The mask is that of a world of
    one, whatever the number of ranks.

    Args:
        p: probability of a zero.
        comm: the ranks that share the tensor.
        dim: the dimension that is cut, counted from the end (-2: the sequence); None: every rank has the whole.
    """

    def __init__(self, p: float, comm: Communicator, dim: int | None = None) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p={p}: it is between 0 and 1")
        if dim is not None and dim >= 0:
            raise ValueError(f"dim={dim}: count it from the end, so that it is negative")
        self.p, self.comm, self.dim = p, comm, dim

    def forward(self, x: Tensor, sizes: list[int] | None = None) -> Tensor:
        """Args: x; ``sizes`` of the cut dimension on each rank, None: found out by a small collective."""
        if not self.training or self.p == 0.0:
            return x
        key = torch.randint(1 << 62, (), dtype=torch.int64) * 2 + 1
        starts = {}
        if self.dim is not None and self.comm.world_size > 1:
            found = sizes_of(x, self.dim, sizes, self.comm)
            starts = {x.dim() + self.dim: (start_of(found, self.comm.rank), sum(found))}
        return counter_dropout(x, self.p, key.to(x.device), starts)

    def extra_repr(self) -> str:
        return f"p={self.p}" + ("" if self.dim is None else f", dim={self.dim}")
