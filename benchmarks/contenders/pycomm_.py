"""pycomm's own communicator, on symmetric memory or on ordinary tensors."""

from __future__ import annotations

import torch

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

    def sync(self) -> None:
        self._comm.barrier()

    def close(self) -> None:
        self._comm.close()
