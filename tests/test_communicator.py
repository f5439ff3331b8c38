"""Wrong arguments: one clear error before anything is sent, and the communicator goes on."""

from __future__ import annotations

import pytest
import torch

import pycomm
from pycomm import Communicator
from pycomm.errors import PeerLostError, PycommError
from tests.pool import Pool


def wrong_arguments(comm: Communicator) -> None:
    matrix = torch.ones(4, 6)
    with pytest.raises(ValueError, match="not contiguous.*pass tensor.contiguous"):
        comm.all_reduce(matrix.t())
    with pytest.raises(ValueError, match="not contiguous"):
        comm.broadcast(matrix[:, ::2])
    with pytest.raises(ValueError, match="max of complex64 is not defined: complex numbers have no order"):
        comm.all_reduce(torch.ones(3, dtype=torch.complex64), "max")
    with pytest.raises(ValueError, match="op mean is not supported"):
        comm.all_reduce(matrix, "mean")
    with pytest.raises(ValueError, match="avg of int32 is not defined"):
        comm.all_reduce(torch.ones(3, dtype=torch.int32), "avg")
    with pytest.raises(ValueError, match="scan: op avg is not supported; scan the sum"):
        comm.scan(matrix, "avg")
    for root in (-1, comm.world_size):
        with pytest.raises(ValueError, match=f"root is {root}"):
            comm.broadcast(matrix, root)
    with pytest.raises(ValueError, match="is on meta"):
        comm.all_reduce(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="has layout torch.sparse_coo: .*to_dense"):
        comm.all_reduce(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="dtype float8_e4m3fn is not supported by reductions, which take float32"):
        comm.all_reduce(torch.ones(3).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="dtype bits8 is not supported; it is one of float32"):
        comm.broadcast(torch.ones(3, dtype=torch.uint8).view(torch.bits8))
    with pytest.raises(ValueError, match="avg of bool is not defined"):
        comm.all_reduce(torch.ones(3, dtype=torch.bool), "avg")
    with pytest.raises(TypeError, match="list is neither a tensor nor"):
        comm.all_reduce([1.0, 2.0])
    with pytest.raises(ValueError, match="timeout_s"):
        comm.barrier(timeout_s=0)
    with pytest.raises(ValueError, match="negative size"):
        comm.empty(3, -1)
    if comm.rank == 0:  # on one rank alone, and asynchronously: still nothing was sent
        with pytest.raises(ValueError, match="avg of int32"):
            comm.all_reduce(torch.ones(3, dtype=torch.int32), "avg", async_op=True)
    assert torch.equal(matrix, torch.ones(4, 6))
    matrix = torch.nn.Parameter(matrix)  # the memory of a leaf that requires gradients is as good as any
    comm.all_reduce(matrix)
    assert (matrix == comm.world_size).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_wrong_arguments_send_nothing(pool: Pool, world_size: int) -> None:
    pool.run(world_size, wrong_arguments)


def zero_elements(comm: Communicator) -> None:
    for tensor in (torch.empty(0), torch.empty(3, 0, 2, dtype=torch.int64), comm.empty(0)):
        comm.all_reduce(tensor, "max")
        comm.broadcast(tensor)
    scalar = torch.tensor(2.0)
    comm.all_reduce(scalar)
    assert scalar == 2.0 * comm.world_size


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_zero_elements_and_scalars(pool: Pool, world_size: int) -> None:
    pool.run(world_size, zero_elements)


def test_a_closed_communicator_says_so() -> None:
    comm = pycomm.init()
    comm.close()
    for call in (comm.barrier, lambda: comm.all_reduce(torch.ones(1)), lambda: comm.empty(3), lambda: comm.split(0)):
        with pytest.raises(PycommError, match="'world' is closed"):
            call()
    with pytest.raises(PycommError, match="closed"):
        comm.all_reduce(torch.ones(1), async_op=True)


def leaving_a_context_with_an_error(comm: Communicator) -> None:
    half = comm.split(0)
    assert half is not None
    if comm.rank == 0:
        with pytest.raises(ValueError, match="on purpose"), half:
            half.barrier()
            raise ValueError("on purpose")
    else:
        half.barrier()
        with pytest.raises(PeerLostError, match="rank 0 aborted: ValueError: on purpose"):
            half.all_reduce(torch.ones(50_000))
    comm.barrier()  # the group that it came from is not touched


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_context_left_by_an_error_aborts(pool: Pool, world_size: int) -> None:
    pool.run(world_size, leaving_a_context_with_an_error)
