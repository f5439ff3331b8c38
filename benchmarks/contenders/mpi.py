"""MPI through mpi4py; Open MPI and MPICH from their wheels, each under its own launcher."""

from __future__ import annotations

import torch
from mpi4py import MPI

from contenders.base import Contender, Run

_DATATYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
}


class Mpi(Contender):
    def __init__(self, rank: None, world_size: int) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank, self.world_size = self._comm.rank, self._comm.size
        if self.world_size != world_size:
            raise RuntimeError(f"the launcher made a world of {self.world_size}, not of {world_size} ranks")

    def version(self) -> str:
        name, numbers = MPI.get_vendor()
        return f"{name} {'.'.join(str(number) for number in numbers)}, its shared-memory transport"

    def unsupported(self, operation: str, dtype: torch.dtype, num_bytes: int) -> str | None:
        if dtype not in _DATATYPES:
            return f"MPI has no datatype for {str(dtype).removeprefix('torch.')}"
        if num_bytes // dtype.itemsize > 2**31 - 1:
            return "the message has more elements than an MPI count holds"
        return super().unsupported(operation, dtype, num_bytes)

    def all_reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        buffer = [output.numpy(), output.numel(), _DATATYPES[output.dtype]]
        return lambda: self._comm.Allreduce(MPI.IN_PLACE, buffer, MPI.SUM)

    def sync(self) -> None:
        self._comm.Barrier()

    def close(self) -> None:
        MPI.Finalize()
