"""Collectives called wrongly: one error on the rank before anything is sent, or the same MismatchError on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pycomm import Communicator
from pycomm.errors import MismatchError
from tests.pool import Pool


def wrong_arguments(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    whole, part = torch.zeros(4 * n, 3), torch.zeros(4, 3)

    def refused(call: Callable[[], object], match: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            call()

    refused(lambda: comm.reduce_scatter(part, torch.zeros(4 * n + 1)), f"{4 * n + 1} elements, which {n} ranks cannot")
    refused(lambda: comm.reduce_scatter(torch.zeros(11), whole), r"output has 11 elements \(shape \(11,\)\), .* 12")
    refused(lambda: comm.reduce_scatter(part, whole, "mean"), "op mean is not supported")
    refused(lambda: comm.reduce_scatter(part.int(), whole.int(), "avg"), "avg of int32 is not defined")
    refused(lambda: comm.reduce_scatter(part.bool(), whole.bool(), "avg"), "avg of bool is not defined")
    refused(lambda: comm.reduce_scatter(part, whole, input_splits=[4]), f"one for each of the {n} ranks")
    refused(lambda: comm.reduce_scatter(part, whole, input_splits=[4] * (n - 1) + [5]), f"add up to {4 * n + 1}, dim 0")
    refused(lambda: comm.reduce_scatter(part, whole, input_splits=[-4] + [4] * (n - 1)), "a count is negative")
    refused(lambda: comm.reduce_scatter(part, whole[0, 0], input_splits=[1] * n), "has no dim 0 to split")
    refused(lambda: comm.all_gather(whole, torch.zeros(13)), "input has 13 elements .* it needs 12")
    refused(lambda: comm.all_gather(whole, part.double()), "input is torch.float64, output is torch.float32")
    refused(lambda: comm.all_gather(whole.t(), part), "output is not contiguous")
    refused(lambda: comm.all_gather(whole, [1.0]), "input: list is neither", TypeError)
    refused(lambda: comm.all_to_all(whole, torch.zeros(6 * n)), f"output has {12 * n} elements")
    refused(lambda: comm.all_to_all(whole, whole), "overlap: pass separate memory")
    refused(lambda: comm.all_to_all(torch.zeros(4 * n + 1), torch.zeros(4 * n), input_splits=[4] * n), "cannot share")
    refused(lambda: comm.reduce(part, n), f"root is {n}, it must be 0 to {n - 1}")
    refused(lambda: comm.gather(None, part, -1), "root is -1")
    other = (rank + 1) % n
    refused(lambda: comm.gather(None, part, rank), f"output is None on rank {rank}, the root")
    refused(lambda: comm.gather(whole, part, other), f"output belongs to rank {other}, the root: pass None on")
    refused(lambda: comm.scatter(part, None, rank), f"input is None on rank {rank}, the root")
    refused(lambda: comm.scatter(part, whole, other), f"input belongs to rank {other}, the root")
    refused(lambda: comm.scatter(part, torch.zeros(12 * n + 1), rank), f"input has {12 * n + 1} elements")
    shifted = whole.view(-1)[12 * rank + 1 :][:11]
    refused(lambda: comm.reduce_scatter(shifted, whole.view(-1)[: 11 * n]), "overlap: they may only where")
    refused(lambda: comm.all_gather(whole, whole[4 * other :][:4]), f"own part of the larger.*element {12 * rank}$")
    refused(lambda: comm.gather(whole, whole[4 * other :][:4], rank), "overlap")
    refused(lambda: comm.scatter(whole[4 * other :][:4], whole, rank), "overlap")
    comm.barrier()  # nothing was sent
    assert not whole.any()


@pytest.mark.parametrize("world_size", [2, 3])
def test_wrong_arguments_are_refused_locally(pool: Pool, world_size: int) -> None:
    pool.run(world_size, wrong_arguments)


def mismatched(comm: Communicator, async_op: bool) -> list[tuple[str, dict[int, str]]]:
    """Rank 1 calls something else each time; outputs stay as they were and the communicator works on."""
    n, odd = comm.world_size, comm.rank == 1
    root = 1 if odd else 0
    whole, part = torch.zeros(4 * n), torch.ones(4)
    full = torch.full((5 * n,), -1.0)
    uneven = [8, 0] + [4] * (n - 2)
    calls: list[Callable[[], object]] = [
        lambda: comm.reduce_scatter(part, whole, "max" if odd else "sum", async_op=async_op),
        lambda: comm.reduce_scatter(torch.ones(5) if odd else part, full if odd else whole, async_op=async_op),
        lambda: comm.all_gather(whole, part if not odd else part[:0], uneven if odd else None, async_op=async_op),
        lambda: (
            comm.all_to_all(whole, torch.ones(4 * n), async_op=async_op)
            if not odd
            else comm.all_to_all(whole, torch.ones(4 * n), uneven, uneven, async_op=async_op)
        ),
        lambda: comm.reduce(part, root, async_op=async_op),
        lambda: comm.gather(whole if comm.rank == root else None, part, root, async_op=async_op),
        lambda: comm.scatter(part, whole if comm.rank == root else None, root, async_op=async_op),
        lambda: comm.all_to_all(whole, torch.ones(4 * n), uneven if odd else [4] * n, [4] * n, async_op=async_op),
    ]
    errors = []
    for call in calls:
        with pytest.raises(MismatchError, match="Nothing was written") as caught:
            work = call()
            if async_op:
                work.wait()  # type: ignore[attr-defined]
        errors.append((str(caught.value), caught.value.calls))
    assert not whole.any()
    assert (part == 1.0).all()
    total = torch.ones(3)
    comm.all_reduce(total)
    assert (total == n).all()
    return errors


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("async_op", [False, True])
def test_mismatches_are_named_on_every_rank(pool: Pool, world_size: int, async_op: bool) -> None:
    first, *others = pool.run(world_size, mismatched, async_op)
    assert all(other == first for other in others)
    n = world_size
    calls = [(called[0], called[1]) for _, called in first]
    assert calls[0] == (f"reduce_scatter(sum, float32[{4 * n}])", f"reduce_scatter(max, float32[{4 * n}])")
    assert calls[1] == (f"reduce_scatter(sum, float32[{4 * n}])", f"reduce_scatter(sum, float32[{5 * n}])")
    assert calls[2][0] == f"all_gather(float32[{4 * n}])"
    assert calls[2][1].startswith(f"all_gather(float32[{4 * n}], uneven splits with hash ")
    assert calls[3] == (f"all_to_all(float32[{4 * n}])", "all_to_all(float32 by splits)")
    assert calls[4] == ("reduce(root=0, sum, float32[4])", "reduce(root=1, sum, float32[4])")
    assert calls[5] == (f"gather(root=0, float32[{4 * n}] in all)", f"gather(root=1, float32[{4 * n}] in all)")
    assert calls[6] == (f"scatter(root=0, float32[{4 * n}] in all)", f"scatter(root=1, float32[{4 * n}] in all)")
    text, called = first[7]
    assert "rank 0 has 4 for rank 1, which expects 8; rank 1 has 4 for rank 1, which expects 0" in text
    fours = ", ".join(["4"] * n)
    assert called[0] == f"all_to_all(elements out [{fours}], in [{fours}])"
