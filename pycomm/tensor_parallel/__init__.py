"""Tensor and sequence parallel: one layer's weights cut over ranks, and products together with their communication.

Layers to write models with, :func:`parallelize` for models that are there, and the operators that both are made of.
docs/tensor_parallel.md explains them.
"""

from pycomm.tensor_parallel.checkpoint import full_state_dict, load_safetensors, meta_parameters, sharded_state_dict
from pycomm.tensor_parallel.dropout import ParallelDropout, counter_dropout
from pycomm.tensor_parallel.functional import (
    all_gather,
    copy_to_ranks,
    gather_from_ranks,
    reduce_from_ranks,
    reduce_scatter,
    scatter_to_ranks,
)
from pycomm.tensor_parallel.layers import (
    ColumnParallelLinear,
    ParallelLayer,
    RowParallelLinear,
    VocabParallelEmbedding,
    sum_gradients,
)
from pycomm.tensor_parallel.parallelize import parallelize, shards_of
from pycomm.tensor_parallel.plans import auto_plan
from pycomm.tensor_parallel.products import all_gather_matmul, copy_matmul, matmul_all_reduce, matmul_reduce_scatter
from pycomm.tensor_parallel.shards import Shard, shard_sizes
from pycomm.tensor_parallel.vocabulary import vocab_parallel_cross_entropy

__all__ = [
    "ColumnParallelLinear",
    "ParallelDropout",
    "ParallelLayer",
    "RowParallelLinear",
    "Shard",
    "VocabParallelEmbedding",
    "all_gather",
    "all_gather_matmul",
    "auto_plan",
    "copy_matmul",
    "copy_to_ranks",
    "counter_dropout",
    "full_state_dict",
    "gather_from_ranks",
    "load_safetensors",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "meta_parameters",
    "parallelize",
    "reduce_from_ranks",
    "reduce_scatter",
    "scatter_to_ranks",
    "shard_sizes",
    "sharded_state_dict",
    "shards_of",
    "sum_gradients",
    "vocab_parallel_cross_entropy",
]
