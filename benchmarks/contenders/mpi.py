"""MPI through mpi4py; Open MPI and MPICH from their wheels, each under its own launcher."""

from __future__ import annotations

import torch
from mpi4py import MPI
from operations import ROOT

from contenders.base import Contender, Run

_DATATYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
}


def _buffer(tensor: torch.Tensor) -> list[object]:
    """As mpi4py takes it: memory and datatype, from which it derives the counts that MPI wants of this operation."""
    return [tensor.numpy(), _DATATYPES[tensor.dtype]]


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
        buffer = _buffer(output)
        return lambda: self._comm.Allreduce(MPI.IN_PLACE, buffer, MPI.SUM)

    def reduce_scatter(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        source, target = _buffer(input), _buffer(output)
        return lambda: self._comm.Reduce_scatter_block(source, target, MPI.SUM)

    def all_gather(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        source, target = _buffer(input), _buffer(output)
        return lambda: self._comm.Allgather(source, target)

    def all_to_all(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        source, target = _buffer(input), _buffer(output)
        return lambda: self._comm.Alltoall(source, target)

    def broadcast(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        buffer = _buffer(output)
        return lambda: self._comm.Bcast(buffer, ROOT)

    def reduce(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        buffer = _buffer(output)
        source, target = (MPI.IN_PLACE, buffer) if self.rank == ROOT else (buffer, None)
        return lambda: self._comm.Reduce(source, target, MPI.SUM, ROOT)

    def scan(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        buffer = _buffer(output)
        return lambda: self._comm.Scan(MPI.IN_PLACE, buffer, MPI.SUM)

    def gather(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        source, target = _buffer(input), _buffer(output) if self.rank == ROOT else None
        return lambda: self._comm.Gather(source, target, ROOT)

    def scatter(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        source, target = _buffer(input) if self.rank == ROOT else None, _buffer(output)
        return lambda: self._comm.Scatter(source, target, ROOT)

    def barrier(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        return self._comm.Barrier

    def send_to(self, tensor: torch.Tensor, peer: int) -> Run:
        buffer = _buffer(tensor)
        return lambda: self._comm.Send(buffer, peer)

    def receive_from(self, tensor: torch.Tensor, peer: int) -> Run:
        buffer = _buffer(tensor)
        return lambda: self._comm.Recv(buffer, peer)

    def sync(self) -> None:
        self._comm.Barrier()

    def close(self) -> None:
        MPI.Finalize()
