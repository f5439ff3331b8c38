"""The collectives beside all_reduce and broadcast: bits on every path, in every kind of memory."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from pycomm import Communicator
from tests.host.blocks import FLOATS, INTS, Arena, bits
from tests.host.collective_cases import IN_PLACE, ONE_TENSOR, REDUCTIONS, Caller, Case
from tests.pool import Pool

CALLS = ("reduce_scatter", "all_gather", "all_to_all", "reduce", "gather", "scatter", "scan")
# Elements of a part: none, in a slot, staged in one slice and in several, no multiple of anything.
COUNTS = (0, 1, 5, 1000, 4099, 40_001, 100_003)
MIXED = ("osossoso", "soosooss")  # memory of the inputs and outputs of four ranks


def even_cases(comm: Communicator, call: str, dtypes: tuple[str, ...], memories: tuple[str, ...]) -> None:
    n = comm.world_size
    arena = Arena(comm, 2 * 8 * n * (max(COUNTS) + 1) + 1000)
    caller = Caller(comm, arena)
    for dtype, count, memory, in_place in product(dtypes, COUNTS, memories, (False, True)):
        if in_place and call not in IN_PLACE:
            continue
        arena.used_bytes = 0
        case = Case(
            call,
            dtype,
            counts=((count,) * (1 if call in ONE_TENSOR else n),),
            memory=(memory * 8)[: 2 * n],
            op="avg" if dtype in FLOATS and count % 2 and call != "scan" else "sum",
            root=count % n,
            seed=count,
            in_place=in_place,
            async_op=count % 3 == 0,
        )
        caller.issue(case).check()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("call", CALLS)
def test_even_parts_in_every_memory(pool: Pool, world_size: int, call: str) -> None:
    pool.run(world_size, even_cases, call, ("float32", "bfloat16"), ("o", "s", *MIXED))


@pytest.mark.parametrize("call", CALLS)
def test_every_dtype(pool: Pool, call: str) -> None:
    moved = () if call in REDUCTIONS else ("bool",)
    pool.run(3, even_cases, call, (*FLOATS, *INTS, *moved), ("o", "s"))


def ragged_cases(comm: Communicator, call: str) -> None:
    n = comm.world_size
    arena = Arena(comm, 2 * 4 * n * 130_000 + 1000)
    caller = Caller(comm, arena)
    rows = [
        [0] * n,
        [7] + [0] * (n - 1),
        [0] * (n - 1) + [120_001],
        [120_001] + [3] * (n - 1),
        [1000 * r for r in range(n)],
    ]
    for i, row in enumerate(rows):
        counts = [row[s:] + row[:s] for s in range(n)] if call == "all_to_all" else [row]
        for memory, in_place, async_op in product(("o", "s", *MIXED), (False, True), (False, True)):
            arena.used_bytes = 0
            case = Case(
                call,
                "float32",
                counts=tuple(tuple(counts_of_rank) for counts_of_rank in counts),
                memory=(memory * 8)[: 2 * n],
                seed=i,
                in_place=in_place and call in IN_PLACE,
                async_op=async_op,
                by_splits=True,
            )
            caller.issue(case).check()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("call", ["reduce_scatter", "all_gather", "all_to_all"])
def test_ragged_parts(pool: Pool, world_size: int, call: str) -> None:
    pool.run(world_size, ragged_cases, call)


def rows_of_matrices(comm: Communicator) -> None:
    """Splits count rows, whatever their width; output shapes are free."""
    n, rank = comm.world_size, comm.rank
    rows = list(range(1, n + 1))
    whole = torch.arange(sum(rows) * 5.0).view(-1, 5)
    start = sum(rows[:rank])
    mine = whole[start : start + rows[rank]]
    gathered = torch.zeros(5, sum(rows))
    comm.all_gather(gathered.view(-1, 5), mine.clone(), output_splits=rows)
    assert torch.equal(gathered.view(-1, 5), whole)
    scattered = torch.zeros(5 * rows[rank])
    comm.reduce_scatter(scattered, whole.clone(), "max", input_splits=torch.tensor(rows).tolist())
    assert torch.equal(scattered, mine.reshape(-1))
    arrays = np.zeros((n, 2), dtype=np.int64), np.full((n, 2), rank)
    comm.all_to_all(*arrays)
    assert (arrays[0] == np.arange(n)[:, None]).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_splits_are_rows(pool: Pool, world_size: int) -> None:
    pool.run(world_size, rows_of_matrices)


def bits_of_the_three_reductions(comm: Communicator, dtype: str) -> None:
    """reduce_scatter and reduce give the bits of all_reduce, on both sides of every threshold."""
    n, rank = comm.world_size, comm.rank
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    tuning = comm._backend._core.tuning()  # type: ignore[attr-defined]
    for threshold in (tuning["one_shot_bytes"] // n, tuning["slice_bytes"], 2 * tuning["slice_bytes"]):
        for parts in (threshold // size // n + difference for difference in (-16, -1, 0, 1, 16)):
            generator = torch.Generator().manual_seed(100 * parts + rank)
            scale = 10.0 ** torch.randint(-3, 4, (n * parts,), generator=generator)
            tensor = (torch.randn(n * parts, generator=generator) * scale).to(getattr(torch, dtype))
            for op in ("sum", "avg"):
                everywhere, at_root = tensor.clone(), tensor.clone()
                part = torch.empty(parts, dtype=tensor.dtype)
                comm.all_reduce(everywhere, op)
                comm.reduce(at_root, n - 1, op)
                comm.reduce_scatter(part, tensor, op)
                assert bits(at_root) == bits(everywhere if rank == n - 1 else tensor)
                assert bits(part) == bits(everywhere[rank * parts : (rank + 1) * parts])


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reductions_agree_in_every_bit(pool: Pool, world_size: int, dtype: str) -> None:
    pool.run(world_size, bits_of_the_three_reductions, dtype)


def overwrite_at_once(comm: Communicator, num_elements: int) -> None:
    """A rank may change its tensors as soon as its call returns: no peer reads them any more."""
    n, rank = comm.world_size, comm.rank
    sources = [comm.empty(n * num_elements), torch.empty(n * num_elements)]
    targets = [comm.empty(n * num_elements), torch.empty(n * num_elements)]
    for turn, source, target in product(range(12), sources, targets):
        value = float(100 * turn + rank)
        own = slice(rank * num_elements, (rank + 1) * num_elements)
        source.fill_(value)
        comm.all_gather(target, source[own])
        source.fill_(-1.0)
        assert torch.equal(target.view(n, -1)[:, 0], 100.0 * turn + torch.arange(n))
        assert torch.equal(target.view(n, -1)[:, -1], 100.0 * turn + torch.arange(n))
        target.fill_(-2.0)
        source.fill_(value)
        comm.all_to_all(target, source)
        source.fill_(-1.0)
        assert torch.equal(target.view(n, -1)[:, -1], 100.0 * turn + torch.arange(n))
        source.fill_(value)
        comm.reduce_scatter(target[own], source, "min")
        source.fill_(-1.0)
        assert (target[own] == 100.0 * turn).all()
        source.fill_(value)
        comm.scatter(target[own], source if rank == turn % n else None, turn % n)
        source.fill_(-1.0)
        assert (target[own] == 100.0 * turn + turn % n).all()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("num_elements", [3, 2000, 60_000])
def test_tensors_are_the_callers_again(pool: Pool, world_size: int, num_elements: int) -> None:
    pool.run(world_size, overwrite_at_once, num_elements)
