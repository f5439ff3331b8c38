"""all_reduce over real processes: bits against a reference in rank order, on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pycomm import Communicator
from tests.pool import Pool

FLOATS = ["float32", "bfloat16", "float16", "float64"]
INTS = ["int8", "uint8", "int32", "int64"]
# Below and above the one-shot threshold (4 KiB over all ranks), one slice and several, and no multiple of anything.
COUNTS = [0, 1, 5, 1000, 4096, 40_001, 300_007]


def values(dtype: str, count: int, rank: int) -> torch.Tensor:
    """Different on every rank; floats of many magnitudes, so that the order of additions shows in the bits."""
    generator = torch.Generator().manual_seed(1000 * count + rank)
    if dtype in INTS:
        info = torch.iinfo(getattr(torch, dtype))
        return torch.randint(info.min // 2, info.max // 2, (count,), generator=generator).to(getattr(torch, dtype))
    scale = 10.0 ** torch.randint(-3, 4, (count,), generator=generator)
    return (torch.randn(count, generator=generator) * scale).to(getattr(torch, dtype))


def reference(dtype: str, count: int, world_size: int, op: str) -> torch.Tensor:
    """From rank 0's value in rank order; 16-bit floats accumulate in fp32 and round once."""
    inputs = [values(dtype, count, rank) for rank in range(world_size)]
    accumulator = inputs[0].float() if dtype in ("bfloat16", "float16") else inputs[0].clone()
    for tensor in inputs[1:]:
        tensor = tensor.to(accumulator.dtype)
        if op in ("sum", "avg"):
            accumulator = accumulator + tensor
        elif op == "prod":
            accumulator = accumulator * tensor
        else:
            accumulator = torch.minimum(accumulator, tensor) if op == "min" else torch.maximum(accumulator, tensor)
    if op == "avg":
        accumulator = accumulator / world_size
    return accumulator.to(inputs[0].dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def place(comm: Communicator, tensor: torch.Tensor, memory: str) -> torch.Tensor:
    """The tensor in symmetric or ordinary memory; "mixed": symmetric on even ranks only."""
    if memory == "ordinary":
        return tensor
    symmetric = comm.empty(*tensor.shape, dtype=tensor.dtype)
    symmetric.copy_(tensor)
    return symmetric if memory == "symmetric" or comm.rank % 2 == 0 else tensor


def reduce_all(comm: Communicator, dtype: str, op: str, memory: str, async_op: bool) -> list[bytes]:
    results = []
    for count in COUNTS:
        tensor = place(comm, values(dtype, count, comm.rank), memory)
        work = comm.all_reduce(tensor, op, async_op=async_op)
        if work is not None:
            work.wait()
        results.append(bits(tensor))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("memory", ["ordinary", "symmetric", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_have_the_reference_bits_on_every_rank(pool: Pool, world_size: int, dtype: str, memory: str) -> None:
    for op in ("sum", "avg"):
        expected = [bits(reference(dtype, count, world_size, op)) for count in COUNTS]
        for async_op in (False, True):
            for got in pool.run(world_size, reduce_all, dtype, op, memory, async_op):
                assert got == expected, (op, async_op)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", FLOATS + INTS)
def test_every_dtype_and_op(pool: Pool, world_size: int, dtype: str) -> None:
    for op in ("sum", "min", "max", "prod"):
        expected = [bits(reference(dtype, count, world_size, op)) for count in COUNTS]
        for memory in ("ordinary", "symmetric"):
            for got in pool.run(world_size, reduce_all, dtype, op, memory, False):
                assert got == expected, (op, memory)


def reduce_views(comm: Communicator) -> None:
    """Parts of one symmetric tensor, at other offsets on other ranks, and another part stays as it was."""
    whole = comm.empty(100_000)
    whole.fill_(-1.0)
    start = 1000 * comm.rank
    part = whole[start : start + 50_000]
    part.fill_(float(comm.rank + 1))
    comm.all_reduce(part)
    total = float(sum(range(1, comm.world_size + 1)))
    assert torch.equal(part, torch.full_like(part, total))
    assert (whole[:start] == -1.0).all()
    assert (whole[start + 50_000 :] == -1.0).all()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_parts_of_a_symmetric_tensor(pool: Pool, world_size: int) -> None:
    pool.run(world_size, reduce_views)


def special_values(comm: Communicator, dtype: torch.dtype, op: str) -> torch.Tensor:
    nan, inf = float("nan"), float("inf")
    rows = [[-0.0, nan, 1.0, inf, inf, -0.0], [-0.0, 1.0, nan, -inf, 1.0, 0.0]]
    tensor = torch.tensor(rows[comm.rank], dtype=dtype)
    comm.all_reduce(tensor, op)
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nan_spreads_and_negative_zero_survives(pool: Pool, dtype: torch.dtype) -> None:
    for op in ("sum", "min", "max"):
        first, second = pool.run(2, special_values, dtype, op)
        assert first.isnan().tolist() == second.isnan().tolist()
        assert first[1].isnan()
        assert first[2].isnan()
        assert torch.signbit(first[0])
    assert pool.run(2, special_values, dtype, "sum")[0][3].isnan()  # inf - inf


def reduce_numpy(comm: Communicator) -> bool:
    array = np.arange(1000, dtype=np.float32)
    comm.all_reduce(array)
    return bool((array == comm.world_size * np.arange(1000, dtype=np.float32)).all())


def test_numpy_arrays_are_reduced_in_place(pool: Pool) -> None:
    assert pool.run(2, reduce_numpy) == [True, True]


def many_async(comm: Communicator) -> None:
    """More operations in flight than there are slots; their tensors are dropped by the caller at once."""
    tensors = [torch.full((10_000 + i,), float(i)) for i in range(40)]
    works = [comm.all_reduce(tensor, async_op=True) for tensor in tensors]
    comm.all_reduce(torch.ones(3, dtype=torch.int64), async_op=True)  # nobody waits for it
    comm.barrier()  # behind all of them
    assert all(work is not None and work.done() for work in works)
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.full_like(tensor, float(i * comm.world_size)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_asynchronous_calls_run_in_issue_order(pool: Pool, world_size: int) -> None:
    pool.run(world_size, many_async)
