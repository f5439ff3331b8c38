"""Dtypes are part of what ranks compare: bytes are never taken for those of another dtype."""

from __future__ import annotations

import operator
from functools import reduce

import pytest
import torch

from pycomm import Communicator
from tests.host.dtype_cases import MOVED, PAIRS, REDUCED, mismatched_pairs, tensor_of
from tests.pool import Pool


def test_no_dtype_passes_for_another(pool: Pool) -> None:
    """Catches bytes that are reinterpreted: bool matched with uint8, int16[2] with bool[4]."""
    pool.run(2, mismatched_pairs, None, PAIRS)


def every_dtype(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    for dtype in MOVED:
        mine, zeros = tensor_of(dtype, 3), torch.zeros(3 * 32 * n, dtype=torch.uint8).view(dtype)
        comm.all_gather(zeros, mine)
        assert torch.equal(zeros.view(torch.uint8), mine.view(torch.uint8).repeat(n)), dtype
        if comm.backend == "shm":
            symmetric = comm.empty(*zeros.shape, dtype=dtype)
            comm.all_gather(symmetric, mine)
            assert torch.equal(symmetric.view(torch.uint8), zeros.view(torch.uint8)), dtype
        if dtype not in REDUCED:
            with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
                comm.all_reduce(mine)
    everyone = [torch.tensor([False, r == 0, True, r == n - 1]) for r in range(n)]
    for op, combined in {"sum": operator.or_, "max": operator.or_, "prod": operator.and_, "min": operator.and_}.items():
        for repeats in (1, 50_000):  # one-shot, and in slices
            flags = everyone[rank].repeat(repeats)
            comm.all_reduce(flags, op)
            assert torch.equal(flags, reduce(combined, everyone).repeat(repeats))
            part = torch.zeros(4 * repeats, dtype=torch.bool)
            comm.reduce_scatter(part, everyone[rank].repeat(repeats * n), op)
            assert torch.equal(part, reduce(combined, everyone).repeat(repeats))
    for dtype in (torch.complex32, torch.complex64, torch.complex128):
        for repeats in (1, 30_000):
            numbers = torch.tensor([complex(rank, 1.0), complex(-1.0, 2.0 * rank)], dtype=dtype).repeat(repeats)
            total = [complex(n * (n - 1) / 2, n), complex(-n, n * (n - 1.0))]
            comm.all_reduce(numbers)
            assert numbers.tolist() == total * repeats
    for dtype, op, why in (
        (torch.bool, "avg", "avg of bool"),
        (torch.int32, "avg", "avg of int32"),
        (torch.complex64, "max", "have no order"),
    ):
        with pytest.raises(ValueError, match=why):
            comm.all_reduce(torch.ones(3, dtype=dtype), op)
    conjugate = torch.ones(3, dtype=torch.complex64).conj()
    with pytest.raises(ValueError, match=r"resolve_conj\(\)"):
        comm.all_reduce(conjugate)
    with pytest.raises(ValueError, match=r"resolve_neg\(\)"):
        comm.all_reduce(conjugate[0].imag)
    comm.barrier()


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_dtype_moves_and_some_are_summed(pool: Pool, world_size: int) -> None:
    """Catches a dtype that is moved or reduced wrongly, and one that is refused on some ranks only."""
    pool.run(world_size, every_dtype)
