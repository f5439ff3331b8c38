"""Attention cut by whole heads: how wide they are, who has which, and key/value heads that several ranks need.

Query heads follow the rule of ``torch.chunk``. Where key/value heads can be cut at the same places, each rank has those
that its queries use. Else (fewer of them than ranks, or groups that straddle a cut) a rank stores some heads, gathers
all of them when it computes, and repeats those it needs, one for each of its query heads: every parameter still has one
owner, so optimizers, gradient norms and checkpoints see nothing special.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycomm.communicator import Communicator
from pycomm.tensor_parallel import products
from pycomm.tensor_parallel.functional import all_gather
from pycomm.tensor_parallel.layers import ParallelLayer, is_linear, out_features_of
from pycomm.tensor_parallel.shards import Shard, shard_bounds

__all__ = ["FUSED", "KEY_VALUE", "QUERY", "RepeatedHeadsLinear", "fits_queries", "head_width"]

QUERY = ("q_proj", "query")
KEY_VALUE = ("k_proj", "v_proj", "key", "value")
FUSED = ("c_attn", "query_key_value")  # segments [query | key | value]; heads of [query | key | value]


def head_width(attention: nn.Module) -> int | None:
    """Features of one head of an attention module, or None if it does not look like one."""
    if not any(hasattr(attention, name) for name in (*QUERY, *FUSED)):
        return None
    for name in ("head_dim", "attention_head_size"):
        width = getattr(attention, name, None)
        if isinstance(width, int):
            return width
    num_heads = getattr(attention, "num_heads", None)
    for name in QUERY:
        query = getattr(attention, name, None)
        if query is not None and is_linear(query) and isinstance(num_heads, int):
            return out_features_of(query) // num_heads
    return None


def fits_queries(num_heads: int, num_kv_heads: int, num_ranks: int) -> bool:
    """Whether the rule of ``torch.chunk`` cuts key/value heads where it cuts their query heads, on every rank."""
    group = num_heads // num_kv_heads
    return all(
        tuple(group * bound for bound in shard_bounds(num_kv_heads, num_ranks, rank))
        == shard_bounds(num_heads, num_ranks, rank)
        for rank in range(num_ranks)
    )


class RepeatedHeadsLinear(ParallelLayer):
    """The key or value projection where heads do not fit the ranks: makes one head for each of this rank's query heads.

    Args:
        module: the unsharded projection.
        comm: the ranks that share it.
        num_heads: query heads of the whole attention.
        width: features of a head.
    """

    def __init__(self, module: nn.Module, comm: Communicator, num_heads: int, width: int, overlap: bool = True) -> None:
        super().__init__()
        self.width, self.overlap, self.reduce_input = width, overlap, True
        self._adopt(module, comm)
        group = num_heads // (self.out_features // width)
        first, last = shard_bounds(num_heads, comm.world_size, comm.rank)
        needed = [head // group for head in range(first, last)]
        self._low, self._high = (needed[0], needed[-1] + 1) if needed else (0, 0)
        self._repeat = [head - self._low for head in needed]

    def _cuts(self, in_features: int, out_features: int) -> dict[str, Shard]:
        shard = Shard(0, out_features, self.width)
        return {"weight": shard, "bias": shard}

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] -> […, one head of this rank's each query head]; a head of zeros where it has none."""
        sizes = self.shard_sizes("weight")
        rows = slice(self._low * self.width, self._high * self.width)
        weight = all_gather(self.matrix, self.comm, 0, sizes)[rows]
        bias = None if self.bias is None else all_gather(self.bias, self.comm, 0, sizes)[rows]
        if self.reduce_input:
            out = products.copy_matmul(x, weight, self.comm, bias, overlap=self.overlap)
        else:
            out = F.linear(x, weight, bias)
        if not self._repeat:
            return F.pad(out, (0, self.width))
        heads: Tensor = out.unflatten(-1, (-1, self.width))
        return heads.index_select(-2, torch.tensor(self._repeat, device=x.device)).flatten(-2)
