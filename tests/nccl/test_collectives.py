"""Every call of the API on the NCCL back end, over the stand-in: results, order on streams, memory, arguments."""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pycomm import Communicator
from pycomm.arguments import MOVED, REDUCED
from pycomm.backends.nccl.library import load_nccl
from pycomm.errors import BackendUnavailableError, MismatchError, StrictOrderError
from tests.nccl.helpers import gpu_of, run
from tests.pool import Pool


def values(count: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers: their sums and products are exact in every dtype, in any order."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (count,), generator=draw).to(dtype)


def reduced(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    stacked = torch.stack(parts)
    if op in ("sum", "avg"):
        total = stacked.double().sum(0)
        return (total / len(parts) if op == "avg" else total).to(parts[0].dtype)
    if op == "prod":
        return stacked.double().prod(0).to(parts[0].dtype)
    return stacked.amin(0) if op == "min" else stacked.amax(0)


class Caller:
    """Makes the calls synchronous or asynchronous, and waits for the device."""

    def __init__(self, comm: Communicator, async_op: bool) -> None:
        self.comm = comm
        self.async_op = async_op

    def __call__(self, name: str, *args: Any, **options: Any) -> None:
        work = getattr(self.comm, name)(*args, async_op=self.async_op, **options)
        if self.async_op:
            work.wait()
        self.comm.synchronize()
        assert not self.async_op or work.done()


def all_collectives(comm: Communicator, seed: int) -> None:
    rank, n = comm.rank, comm.world_size
    draw = random.Random(seed)
    for turn, dtype in enumerate(REDUCED):
        call = Caller(comm, turn % 2 == 1)
        op = draw.choice(["sum", "min", "max", "prod"] + (["avg"] if dtype.is_floating_point else []))
        count = draw.choice([0, 1, 17, 5000])
        root = draw.randrange(n)
        inputs = [values(count, 100 * turn + r, dtype) for r in range(n)]

        tensor = inputs[rank].clone()
        call("all_reduce", tensor, op)
        assert torch.equal(tensor, reduced(inputs, op)), (op, dtype, count)

        tensor = inputs[rank].clone()
        call("reduce", tensor, root, op)
        assert torch.equal(tensor, reduced(inputs, op) if rank == root else inputs[rank])

        tensor, prefix_op = inputs[rank].clone(), "sum" if op == "avg" else op
        call("scan", tensor, prefix_op)
        assert torch.equal(tensor, reduced(inputs[: rank + 1], prefix_op))

        tensor = inputs[rank].clone()
        call("broadcast", tensor, root)
        assert torch.equal(tensor, inputs[root])

        output = torch.empty(count * n, dtype=dtype) if rank == root else None
        call("gather", output, inputs[rank], root)
        assert output is None or torch.equal(output, torch.cat(inputs))

        output = torch.empty(count, dtype=dtype)
        call("scatter", output, torch.cat(inputs) if rank == root else None, root)
        assert torch.equal(output, inputs[rank])

        for splits in (None, [(r * 3) % 4 for r in range(n)]):
            counts = [count] * n if splits is None else splits
            wholes = [values(sum(counts), 1000 * turn + r, dtype) for r in range(n)]
            output = torch.empty(counts[rank], dtype=dtype)
            call("reduce_scatter", output, wholes[rank].clone(), op, splits)
            assert torch.equal(output, reduced(wholes, op).split(counts)[rank])
            parts = [values(counts[r], 2000 * turn + r, dtype) for r in range(n)]
            output = torch.empty(sum(counts), dtype=dtype)
            call("all_gather", output, parts[rank], splits)
            assert torch.equal(output, torch.cat(parts))

        outputs = torch.empty(count * n, dtype=dtype)
        whole = [values(count * n, 3000 * turn + r, dtype) for r in range(n)]
        call("all_to_all", outputs, whole[rank])
        assert torch.equal(outputs, torch.cat([w[rank * count : (rank + 1) * count] for w in whole]))

        table = [[(s + 2 * d) % 3 for d in range(n)] for s in range(n)]  # from s to d
        received = [table[s][rank] for s in range(n)]
        whole = [values(sum(table[r]), 4000 * turn + r, dtype) for r in range(n)]
        outputs = torch.empty(sum(received), dtype=dtype)
        call("all_to_all", outputs, whole[rank], received, table[rank])
        assert torch.equal(outputs, torch.cat([whole[s].split(table[s])[rank] for s in range(n)]))
        call("barrier")


def in_place_and_bool(comm: Communicator) -> None:
    rank, n = comm.rank, comm.world_size
    whole = torch.arange(3 * n, dtype=torch.float32)
    comm.reduce_scatter(whole[3 * rank : 3 * rank + 3], whole)
    comm.synchronize()
    assert torch.equal(whole[3 * rank : 3 * rank + 3], n * torch.arange(3 * rank, 3 * rank + 3).float())
    whole = torch.zeros(2 * n, dtype=torch.bool)
    whole[2 * rank] = True
    comm.all_gather(whole, whole[2 * rank : 2 * rank + 2])
    comm.synchronize()
    assert torch.equal(whole, torch.tensor([True, False] * n))
    assert str(comm._backend._core.latest()) == f"all_gather(bool[{2 * n}])"  # type: ignore[attr-defined]
    for dtype in MOVED:
        mine = torch.full((16,), rank, dtype=torch.uint8).view(dtype)
        everyone = torch.zeros(16 * n, dtype=torch.uint8).view(dtype)
        comm.all_gather(everyone, mine)
        comm.synchronize()
        assert everyone.view(torch.uint8).tolist() == [r for r in range(n) for _ in range(16)], dtype
    flags, pairs = torch.tensor([rank == 0, True, False]), torch.tensor([complex(rank, 1)] * 3)
    comm.all_reduce(flags, "prod")
    comm.all_reduce(pairs, "avg")
    comm.synchronize()
    assert flags.tolist() == [n == 1, True, False]
    assert pairs.tolist() == [complex((n - 1) / 2, 1)] * 3
    assert str(comm._backend._core.latest()) == "all_reduce(avg, complex64[3])"  # type: ignore[attr-defined]
    whole = torch.full((2 * n,), rank)
    comm.gather(whole if rank == 0 else None, whole[2 * rank : 2 * rank + 2])
    comm.synchronize()
    assert rank != 0 or torch.equal(whole, torch.arange(n).repeat_interleave(2))
    array = torch.full((4,), 1.0).numpy()  # DLPack
    comm.all_reduce(array)
    comm.synchronize()
    assert (array == n).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_collectives(pool: Pool, standin: Path, tmp_path: Path, size: int) -> None:
    run(pool, size, standin, tmp_path, all_collectives, size)
    (again := tmp_path / "again").mkdir()
    run(pool, size, standin, again, in_place_and_bool)


def messages(comm: Communicator) -> None:
    rank, n = comm.rank, comm.world_size
    left, right = (rank - 1) % n, (rank + 1) % n
    for count in (0, 3, 10_000):
        mine, theirs = torch.full((count,), float(rank)), torch.empty(count)
        with comm.batch() as batch:
            batch.send(mine, right, tag=count)
            batch.recv(theirs, left, tag=count)
        assert batch.sources == [right, left]
        comm.synchronize()
        assert (theirs == left).all()
    several = [torch.full((5,), float(10 * rank + i)) for i in range(3)]
    into = [torch.empty(5) for _ in range(3)]
    with comm.batch(async_op=True) as batch:
        for tensor, received in zip(several, into, strict=True):
            batch.send(tensor, right)
            batch.recv(received, left)
    assert batch.work is not None
    batch.work.wait(timeout_s=60)
    assert [received[0].item() for received in into] == [10 * left + i for i in range(3)]
    if n > 1:
        tensor = torch.full((7,), float(rank))
        if rank == 0:
            comm.send(tensor, 1)
        elif rank == 1:
            assert comm.recv(tensor, 0) == 0
            comm.synchronize()
            assert (tensor == 0).all()
        tensor = torch.full((7,), float(rank))
        if rank == 0:
            comm.send(tensor, n - 1, async_op=True)
        elif rank == n - 1:
            work = comm.recv(tensor, 0, async_op=True)
            assert not isinstance(work, int)
            work.wait(timeout_s=60)
            assert (work.source, tensor[0].item()) == (0, 0.0)
    with pytest.raises(ValueError, match="any source"):
        comm.recv(torch.empty(1))
    with pytest.raises(StrictOrderError, match="oneself"):
        comm.send(torch.ones(1), rank)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_messages(pool: Pool, standin: Path, tmp_path: Path, size: int) -> None:
    run(pool, size, standin, tmp_path, messages)


def order_on_streams(comm: Communicator) -> None:
    """A call reads what the current stream writes before it, and what the stream does after a wait reads its result."""
    gpu, n = gpu_of(comm), comm.world_size
    for async_op in (False, True):
        tensor, source, seen = torch.zeros(4), torch.full((4,), 1.0 + comm.rank), torch.zeros(4)
        gpu.copy_later(tensor, source, 0.1)
        start = time.monotonic()
        work = comm.all_reduce(tensor, async_op=async_op)
        gpu.copy_later(seen, tensor, 0.0)
        if work is not None:
            work.wait()
            gpu.copy_later(seen, tensor, 0.0)
        assert time.monotonic() - start < 30  # the host waits for the ranks at most, once
        gpu.synchronize()
        assert (seen == n * (n + 1) / 2).all()
    slow, quick = torch.zeros(4), torch.ones(4)
    gpu.stream, before = gpu.new_stream(), gpu.stream
    gpu.copy_later(slow, torch.ones(4), 0.2)
    work = comm.all_reduce(slow, async_op=True)
    assert work is not None
    assert not work.done()
    gpu.stream = before
    comm.all_reduce(quick)  # another stream, the same communicator: behind the first
    gpu.synchronize()
    assert work.done()
    assert (slow == n).all()


def memory_of_dropped_tensors(comm: Communicator) -> None:
    """An asynchronous call keeps its tensors until it is over, and no longer."""
    gpu = gpu_of(comm)
    gpu.holds = False
    alive = []
    gpu.copy_later(torch.zeros(1), torch.zeros(1), 0.2)

    class Tensor(torch.Tensor):
        def __del__(self) -> None:
            alive.remove(id(self))

    for waits in (False, True):  # a wait is the stream's, and returns before the device is through with the call
        tensor = torch.ones(1000).as_subclass(Tensor)
        alive.append(id(tensor))
        work = comm.all_reduce(tensor, async_op=True)
        assert work is not None
        if waits:
            work.wait()
        del tensor, work
    gc.collect()
    assert len(alive) == 2
    comm.synchronize()
    gc.collect()
    assert alive == []


def test_order_and_memory(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 2, standin, tmp_path, order_on_streams)
    (again := tmp_path / "again").mkdir()
    run(pool, 2, standin, again, memory_of_dropped_tensors)


def refused(comm: Communicator) -> None:
    with pytest.raises(ValueError, match="avg of int32"):
        comm.all_reduce(torch.ones(4, dtype=torch.int32), "avg")
    with pytest.raises(ValueError, match="not contiguous"):
        comm.all_reduce(torch.ones(4, 4).t())
    with pytest.raises(ValueError, match="dst is 2"):
        comm.send(torch.ones(1), 2)
    with pytest.raises(BackendUnavailableError, match="peers"):
        comm.peers(comm.empty(4))
    with pytest.raises(MismatchError, match="rank 1 called empty\\(32 bytes\\)"):
        comm.empty(2 * (comm.rank + 1), dtype=torch.int64)
    assert comm.empty(2, 3).shape == (2, 3)
    with pytest.raises(ValueError, match="max_ctas"), comm.cta_budget(0):
        pass
    tensor = torch.ones(8)
    with comm.cta_budget(3):
        comm.all_reduce(tensor)
        assert gpu_of(comm).library.standin_last_max_ctas() == 3
    work = comm.barrier(async_op=True)
    assert work is not None
    work.wait()
    assert (tensor == 2).all()


def other_default_device(comm: Communicator) -> None:
    """As after ``torch.set_default_device("cuda")``: what ranks tell each other over the host stays there."""
    tensor = torch.ones(4)
    with torch.device("meta"):
        part = comm.split(0)
        assert part is not None
        part.empty(0)
        part.all_reduce(tensor)
        part.synchronize()
        assert comm.on_host() is not None
        part.close()
    assert (tensor == comm.world_size).all()


def older(comm: Communicator) -> None:
    with patch.dict(os.environ, {"STANDIN_VERSION": "22809"}):
        comm._backend._library = load_nccl()  # type: ignore[attr-defined]
    with pytest.raises(BackendUnavailableError, match="need NCCL 2.31, this is 2.28.9"), comm.cta_budget(3):
        pass


def test_arguments_and_budgets(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 2, standin, tmp_path, refused)
    (other := tmp_path / "other").mkdir()
    run(pool, 2, standin, other, other_default_device)
    (again := tmp_path / "again").mkdir()
    run(pool, 1, standin, again, older)
