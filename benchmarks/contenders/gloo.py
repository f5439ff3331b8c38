"""torch.distributed with gloo, as ``pip install torch`` gives it: TCP over the loopback interface."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from operations import ROOT

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

    def reduce_scatter(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return lambda: dist.reduce_scatter_tensor(output, input)

    def all_gather(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return lambda: dist.all_gather_into_tensor(output, input)

    def all_to_all(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return lambda: dist.all_to_all_single(output, input)

    def broadcast(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return lambda: dist.broadcast(output, ROOT)

    def reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return lambda: dist.reduce(output, ROOT)

    def gather(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        parts = list(output.chunk(self.world_size)) if self.rank == ROOT else None
        return lambda: dist.gather(input, parts, ROOT)

    def scatter(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        parts = list(input.chunk(self.world_size)) if self.rank == ROOT else None
        return lambda: dist.scatter(output, parts, ROOT)

    def barrier(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return dist.barrier

    def send_to(self, tensor: torch.Tensor, peer: int) -> Run:
        return lambda: dist.send(tensor, peer)

    def receive_from(self, tensor: torch.Tensor, peer: int) -> Run:
        return lambda: dist.recv(tensor, peer)

    def sync(self) -> None:
        dist.barrier()

    def close(self) -> None:
        dist.destroy_process_group()
