"""torch.distributed with gloo, as ``pip install torch`` gives it: TCP over the loopback interface."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from contenders.base import Contender, Run


class Gloo(Contender):
    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        timeout = timedelta(seconds=120)
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, rank == 0, timeout=timeout
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)

    def version(self) -> str:
        return f"gloo of torch {torch.__version__}, TCP on {os.environ['GLOO_SOCKET_IFNAME']}"

    def all_reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return lambda: dist.all_reduce(output)

    def sync(self) -> None:
        dist.barrier()

    def close(self) -> None:
        dist.destroy_process_group()
