"""DeepSpeed's shared-memory all-reduce for CPU inference (its ``ShareMemCommBuilder`` operator), one thread a rank."""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from contenders.base import Contender, Run

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class DeepSpeed(Contender):
    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        # Reads LOCAL_SIZE, MASTER_ADDR and MASTER_PORT; the first load on a machine compiles.
        ShareMemCommBuilder().load(verbose=False).initialize(world_size, rank)
        self._operator = torch.ops.deepspeed.inference_all_reduce_
        self._token = torch.zeros(1)

    def version(self) -> str:
        return f"deepspeed {deepspeed.__version__}, shm_open buffers of 32 MiB, {torch.get_num_threads()} thread"

    def unsupported(self, operation: str, dtype: torch.dtype, num_bytes: int) -> str | None:
        if operation != "all_reduce":
            return "its operator is an all_reduce and nothing else"
        if dtype not in _DTYPES:
            return f"its operator leaves {str(dtype).removeprefix('torch.')} unreduced"
        if num_bytes > 2**31 - 1:
            return "its operator counts bytes in 32 bits"
        return super().unsupported(operation, dtype, num_bytes)

    def all_reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        operator = self._operator
        return lambda: operator(output)

    def sync(self) -> None:
        # It has no barrier, but its all-reduce of one element returns only when every rank has entered.
        self._operator(self._token)
