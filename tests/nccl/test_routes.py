"""Which all-reduces pycomm's kernels do, over the stand-in: memory that ranks map, agreement, differences, aborts."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pycomm import Communicator
from pycomm.arguments import REDUCED
from pycomm.backends.nccl import NcclBackend
from pycomm.errors import BackendUnavailableError, MismatchError, PeerLostError, PeerTimeoutError, PycommError
from tests.nccl.helpers import SOON_S, StandInGpu, gpu_of, ranks, ranks_on_hosts, run, until_it_fails, with_kernels
from tests.nccl.test_collectives import reduced, values
from tests.pool import TIMEOUT_S, Pool

ONE_SHOT, TWO_SHOT = 1024, 65536  # bytes


def kernels(gpu: StandInGpu, rank: int) -> None:
    """A ``setup``: kernels, up to sizes that tests can do. The variable is as the pool's processes had it after."""
    with_kernels(gpu, rank)
    before = os.environ.get("PYCOMM_TUNE")
    gpu.closing.callback(lambda: os.environ.update(PYCOMM_TUNE=before or ""))
    os.environ["PYCOMM_TUNE"] = f"{before or ''},gpu_one_shot_bytes={ONE_SHOT},gpu_two_shot_bytes={TWO_SHOT}"


def backend_of(comm: Communicator) -> NcclBackend:
    backend = comm._backend
    assert isinstance(backend, NcclBackend)
    return backend


def launched(comm: Communicator) -> list[str]:
    """Kernels since the last look."""
    symmetric = backend_of(comm)._symmetric
    assert symmetric is not None
    names: list[str] = symmetric._kernels.launched  # type: ignore[attr-defined]
    found = list(names)
    names.clear()
    return found


def all_reduces(comm: Communicator) -> None:
    rank, n = comm.rank, comm.world_size
    assert "one_shot up to 1 KiB" in backend_of(comm).own_kernels
    for turn, dtype in enumerate(REDUCED):
        size = dtype.itemsize
        for op in ("sum", "max", "prod") if turn % 2 else ("min", "avg" if dtype.is_floating_point else "sum"):
            for count, route in ((0, []), (17, ["one_shot"]), (ONE_SHOT // size, ["one_shot"]), (5001, ["two_shot"])):
                inputs = [values(count, 10 * turn + r, dtype) for r in range(n)]
                symmetric = comm.empty(count, dtype=dtype)
                symmetric.copy_(inputs[rank])
                comm.barrier()  # nobody writes to it before it is filled: copies here are not on the stream
                work = comm.all_reduce(symmetric, op, async_op=turn % 2 == 0)
                if work is not None:
                    work.wait()
                comm.synchronize()
                assert torch.equal(symmetric, reduced(inputs, op)), (op, dtype, count)
                assert launched(comm) == route
    ordinary = torch.ones(2000)
    comm.all_reduce(ordinary)  # too large for one step, and not mapped
    large = comm.empty(TWO_SHOT // 4 + 1)
    large.fill_(1)
    comm.all_reduce(large)
    with comm.cta_budget(2):
        comm.all_reduce(large[:10])
    comm.synchronize()
    assert (launched(comm), ordinary[5], large[5], large[-1]) == ([], n, n * n, n)


def parts_of_a_tensor(comm: Communicator) -> None:
    """Slices are symmetric, peers see them, and what is dropped is forgotten."""
    tensor = comm.empty(4, 3000)
    assert (tensor == 0).all()
    tensor[2] = comm.rank
    comm.barrier()
    assert [int(peer[0]) for peer in comm.peers(tensor[2])] == list(range(comm.world_size))
    comm.barrier()
    comm.all_reduce(tensor[2], "max")
    comm.synchronize()
    assert launched(comm) == ["two_shot"]
    assert (tensor[2] == comm.world_size - 1).all()
    assert (tensor[1] == 0).all()
    with pytest.raises(ValueError, match="make it with comm.empty"):
        comm.peers(torch.ones(3))
    symmetric = backend_of(comm)._symmetric
    assert symmetric is not None
    gpu_of(comm)._held.clear()
    assert len(symmetric._memories) == 1
    del tensor
    gc.collect()
    assert len(symmetric._memories) == 0


def splits(comm: Communicator) -> None:
    """Groups have kernels of their own, and memory of one is none of another's."""
    part = comm.split(comm.rank % 2)
    assert part is not None
    tensor = part.empty(5000)
    tensor.fill_(comm.rank)
    part.barrier()
    part.all_reduce(tensor)
    comm.all_reduce(tensor)
    small = torch.ones(3)
    comm.all_reduce(small)
    comm.synchronize()
    part.synchronize()
    members = range(comm.rank % 2, comm.world_size, 2)
    if len(members) == 1:
        assert backend_of(part).own_kernels == "not used: a world of one"
    else:
        assert launched(part) == ["two_shot"]
    assert launched(comm) == ["one_shot"]
    assert (small == comm.world_size).all()
    part.close()


def in_order_on_streams(comm: Communicator) -> None:
    """A kernel comes after what the stream holds, and calls after it, on whatever stream, after it."""
    gpu = gpu_of(comm)
    tensor, source, seen = comm.empty(3000), torch.full((3000,), 2.0 + comm.rank), torch.zeros(3000)
    comm.barrier()
    gpu.copy_later(tensor, source, 0.1)
    comm.all_reduce(tensor, "max")  # on the current stream
    work = comm.all_reduce(tensor, async_op=True)  # on another, where nothing else orders it behind the first
    gpu.stream = gpu.new_stream()
    third = comm.all_reduce(tensor, "max", async_op=True)
    comm.all_reduce(tensor, "sum")
    gpu.copy_later(seen, tensor, 0.0)
    assert work is not None
    assert third is not None
    comm.synchronize()
    gpu.synchronize()
    n = comm.world_size
    assert (seen == (n + 1) * n * n).all()
    assert launched(comm) == ["two_shot"] * 4


@pytest.mark.parametrize("size", [2, 3])
def test_results_and_routes(pool: Pool, standin: Path, tmp_path: Path, size: int) -> None:
    for index, body in enumerate((all_reduces, parts_of_a_tensor, splits, in_order_on_streams)):
        (folder := tmp_path / str(index)).mkdir()
        run(pool, size, standin, folder, body, setup=kernels)


def rank_1_has_none(gpu: StandInGpu, rank: int) -> None:
    if rank != 1:
        kernels(gpu, rank)


def rank_1_has_no_memory(gpu: StandInGpu, rank: int) -> None:
    kernels(gpu, rank)
    gpu.memory.budget_bytes = 10 if rank == 1 else None


def rank_1_is_far(gpu: StandInGpu, rank: int) -> None:
    kernels(gpu, rank)
    gpu.memory.name = f"GPU {rank}"
    gpu.memory.unreachable = "GPU 1" if rank == 0 else None


def nccl_does_all(comm: Communicator, reason: str) -> None:
    assert backend_of(comm).own_kernels == f"not used: {reason}"
    tensor = comm.empty(100)
    tensor.fill_(1)
    comm.all_reduce(tensor)
    comm.synchronize()
    assert (tensor == 2).all()
    with pytest.raises(BackendUnavailableError, match=r"peers: .* \(rank [01]\)"):
        comm.peers(tensor)


NOT_ON_ALL = (
    (rank_1_has_none, "the stand-in was asked for no kernels (rank 1)"),
    (rank_1_has_no_memory, f"{64 + ONE_SHOT} bytes are too many (rank 1)"),
    (rank_1_is_far, "GPU 0 cannot access the memory of GPU 1 (rank 0)"),
)


def test_one_rank_that_cannot_map_another_is_nccl_for_all(pool: Pool, standin: Path, tmp_path: Path) -> None:
    for index, (setup, reason) in enumerate(NOT_ON_ALL):
        (folder := tmp_path / str(index)).mkdir()
        run(pool, 2, standin, folder, nccl_does_all, reason, setup=setup)


def too_much(comm: Communicator) -> None:
    gpu_of(comm).memory.budget_bytes = 4000 if comm.rank == 1 else None
    with pytest.raises(MemoryError, match=r"8000 bytes are too many \(rank 1\)"):
        comm.empty(2000)
    tensor = comm.empty(500)
    tensor.fill_(1)
    comm.barrier()
    comm.all_reduce(tensor)
    comm.synchronize()
    assert (tensor == 2).all()
    assert launched(comm) == ["two_shot"]


def test_memory_that_a_rank_cannot_have_is_an_error_on_all(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 2, standin, tmp_path, too_much, setup=kernels)


def differing_places(comm: Communicator, connection: Any, kind: str) -> str:
    tensor = comm.empty(2, 3000)
    comm.barrier()
    last = comm.rank == comm.world_size - 1
    start = time.monotonic()
    if kind == "ordinary":
        comm.all_reduce(torch.ones(3000) if last else tensor[0])
    elif kind == "offset":
        comm.all_reduce(tensor[1] if last else tensor[0])
    else:
        comm.all_reduce(tensor[0, : 100 if last else 3000])
    with pytest.raises(MismatchError) as caught:
        until_it_fails(comm.synchronize)
    assert time.monotonic() - start < SOON_S
    gpu_of(comm).synchronize()  # no kernel waits for ever
    return str(caught.value)


DIFFERENCES = {
    "ordinary": "rank 2 called all_reduce(sum, float32[3000])",
    "offset": "two_shot kernel, at byte 12000 of symmetric memory 1)",
    "size": "rank 2 called all_reduce(sum, float32[100], one_shot kernel)",
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_ranks_that_take_different_routes(standin: Path, tmp_path: Path, kind: str) -> None:
    with ranks(3, standin, tmp_path, differing_places, kind, timeout_s=TIMEOUT_S, setup=kernels) as group:
        for message in group.results():
            assert "rank 0 called all_reduce(sum, float32[3000], two_shot kernel, at byte 0 of symmetric mem" in message
            assert DIFFERENCES[kind] in message


def aborted(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 1:
        comm.abort("enough")
    else:
        comm.all_reduce(torch.ones(4))
    with pytest.raises(PeerLostError, match="rank 1 aborted: enough"):
        until_it_fails(comm.synchronize)
    gpu_of(comm).synchronize()


def missing(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 0:
        comm.all_reduce(torch.ones(4), timeout_s=0.5)
    with pytest.raises(PeerTimeoutError, match="rank 1 did not come within 0.5 s") as caught:
        until_it_fails(comm.synchronize)
    assert caught.value.missing_ranks == [1]
    gpu_of(comm).synchronize()


def kernels_of_little_patience(gpu: StandInGpu, rank: int) -> None:
    kernels(gpu, rank)
    gpu.memory.kernel_timeout_s = 0.3


def given_up(comm: Communicator, connection: Any) -> None:
    """Ranks 0 and 2 wait for rank 1; whichever kernel gives up first stops the other's, which blames nobody."""
    comm.barrier()
    if comm.rank != 1:
        comm.all_reduce(torch.ones(4))
    with pytest.raises(PeerTimeoutError, match="a kernel gave up: rank 1 did not come in time") as caught:
        until_it_fails(comm.synchronize)
    assert caught.value.missing_ranks == [1]


def refused(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    symmetric = backend_of(comm)._symmetric
    assert symmetric is not None
    symmetric._kernels.refuses = comm.rank == 1  # type: ignore[attr-defined]
    with pytest.raises(PycommError, match="one_shot: no such grid"):
        comm.all_reduce(torch.ones(4))
        until_it_fails(comm.synchronize)
    gpu_of(comm).synchronize()


def test_kernels_end_with_the_communicator(standin: Path, tmp_path: Path) -> None:
    bodies = (
        (2, aborted, kernels),
        (2, missing, kernels),
        (2, refused, kernels),
        (3, given_up, kernels_of_little_patience),
    )
    for index, (size, body, setup) in enumerate(bodies):
        (folder := tmp_path / str(index)).mkdir()
        with ranks(size, standin, folder, body, timeout_s=TIMEOUT_S, setup=setup) as group:
            group.results()


def over_windows(comm: Communicator, connection: Any) -> None:
    gpu = gpu_of(comm)
    tensor = comm.empty(3000)
    tensor.fill_(comm.rank)
    comm.barrier()
    comm.all_reduce(tensor, "max")
    comm.synchronize()
    assert launched(comm) == ["two_shot"]
    assert (tensor == comm.world_size - 1).all()
    assert (gpu.library.standin_num_windows(), gpu.library.standin_num_memories()) == (2, 2)
    gpu._held.clear()
    del tensor
    gc.collect()
    comm.empty(10)  # gives back what was dropped before
    assert gpu.library.standin_num_windows() == 2
    comm.barrier()


def without_nvlink(gpu: StandInGpu, rank: int) -> None:
    kernels(gpu, rank)
    if rank == 1:
        os.environ["STANDIN_NO_NVLINK"] = "1"


def without_memory(gpu: StandInGpu, rank: int) -> None:
    kernels(gpu, rank)
    if rank == 1:
        os.environ["STANDIN_NO_MEMORY"] = "1"


def no_windows(comm: Communicator, connection: Any) -> str:
    comm.barrier()
    return backend_of(comm).own_kernels


def test_several_hosts_map_each_other_by_windows(standin: Path, tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ranks_on_hosts("ab", store.port, standin, tmp_path, over_windows, kernels) as group:
        group.results()


NO_WINDOWS = {
    without_nvlink: "NCCL's window of rank 0 is not mapped here: the two GPUs are not in one NVLink domain (rank 1)",
    without_memory: f"ncclMemAlloc of {64 + ONE_SHOT} bytes: an error of the stand-in (rank 1)",
}


@pytest.mark.parametrize("setup", NO_WINDOWS)
def test_windows_that_one_rank_cannot_have_are_used_by_none(standin: Path, tmp_path: Path, setup: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ranks_on_hosts("ab", store.port, standin, tmp_path, no_windows, setup) as group:
        assert group.results() == [f"not used: {NO_WINDOWS[setup]}"] * 2
