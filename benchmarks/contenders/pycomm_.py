"""pycomm's own communicator, on symmetric memory or on ordinary tensors."""

from __future__ import annotations

import torch
from operations import ROOT

import pycomm
from contenders.base import Contender, Run
from pycomm import _C


class Pycomm(Contender):
    def __init__(self, rank: int, world_size: int, symmetric: bool) -> None:
        self._symmetric = symmetric
        self._comm = pycomm.init("shm", timeout_s=120.0)
        self.rank, self.world_size = self._comm.rank, self._comm.world_size

    def version(self) -> str:
        kind = "symmetric memory" if self._symmetric else "ordinary tensors, staged"
        return f"pycomm {pycomm.__version__}, {self._comm.backend}, {kind}, SIMD {_C.simd_level()}"

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self._comm.empty(count, dtype=dtype) if self._symmetric else super().empty(count, dtype)

    def all_reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        all_reduce = self._comm.all_reduce
        return lambda: all_reduce(output)

    def reduce_scatter(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        reduce_scatter = self._comm.reduce_scatter
        return lambda: reduce_scatter(output, input)

    def all_gather(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        all_gather = self._comm.all_gather
        return lambda: all_gather(output, input)

    def all_to_all(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        all_to_all = self._comm.all_to_all
        return lambda: all_to_all(output, input)

    def broadcast(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        broadcast = self._comm.broadcast
        return lambda: broadcast(output, ROOT)

    def reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        reduce = self._comm.reduce
        return lambda: reduce(output, ROOT)

    def scan(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        scan = self._comm.scan
        return lambda: scan(output)

    def gather(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        gather, gathered = self._comm.gather, output if self.rank == ROOT else None
        return lambda: gather(gathered, input, ROOT)

    def scatter(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        scatter, scattered = self._comm.scatter, input if self.rank == ROOT else None
        return lambda: scatter(output, scattered, ROOT)

    def barrier(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return self._comm.barrier

    def send_to(self, tensor: torch.Tensor, peer: int) -> Run:
        send = self._comm.send
        return lambda: send(tensor, peer)

    def receive_from(self, tensor: torch.Tensor, peer: int) -> Run:
        recv = self._comm.recv
        return lambda: recv(tensor, peer)

    def sync(self) -> None:
        self._comm.barrier()

    def close(self) -> None:
        self._comm.close()
