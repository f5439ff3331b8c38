"""Data parallelism: one replica of the model per rank, gradients averaged in buckets while backward still runs."""

from pycomm.data_parallel.clip import clip_grad_norm_
from pycomm.data_parallel.module import DataParallel
from pycomm.data_parallel.sharded_adamw import ShardedAdamW

__all__ = ["DataParallel", "ShardedAdamW", "clip_grad_norm_"]
