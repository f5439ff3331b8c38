"""Data parallelism: one replica of the model per rank, gradients averaged in buckets while backward still runs.

The words of this package, one for each idea. A *trained* parameter is one that requires a gradient, with its place in
buffers. A *family* is the parameters of equal dtypes, which share buffers. A *bucket* is the gradients that travel in
one collective; under stage 2 it is cut into *messages*, and those into *pieces* of parameters. A *shard* is the
elements of a parameter that one rank owns: whole norm blocks. A *run* is a shard, or what of it lies in one message, as
the extension takes it. *Packed* memory has a rank's shards one after the other. A *part* is a tensor that
``gradient_parts`` gives out. *One pass* averages gradients and takes their norms together, on symmetric memory. A
*step* is what backward, clipping and the optimizer share from one update to the next (``step.py``).
"""

from pycomm.data_parallel.clip import clip_grad_norm_
from pycomm.data_parallel.module import DataParallel
from pycomm.data_parallel.sharded_adamw import ShardedAdamW

__all__ = ["DataParallel", "ShardedAdamW", "clip_grad_norm_"]
