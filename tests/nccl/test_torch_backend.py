"""The torch back end on CUDA tensors, over the stand-in: every call, order on streams, futures, batches, groups."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from pycomm import Communicator
from pycomm.errors import MismatchError, PeerLostError, PeerTimeoutError
from pycomm.torch_backend.device_work import DeviceWork
from pycomm.torch_backend.process_group import PycommProcessGroup
from tests.nccl.helpers import StandInGpu, gpu_of, ranks, read_by_the_host, until_it_fails
from tests.nccl.torch_helpers import GPU, for_cuda_tensors, run
from tests.pool import TIMEOUT_S, Pool
from tests.torch_backend import scripts, test_collectives
from tests.torch_backend.helpers import run as run_on_host
from tests.torch_backend.test_scripts import equal

LATER_S = 0.1
# A mean over two ranks is halved before or after the sum, which costs a rounding each of numbers below 8.
TWO_RANKS = 1e-6


def the_group() -> PycommProcessGroup:
    group = dist.group.WORLD
    assert isinstance(group, PycommProcessGroup)
    return group


def every_call(gpu: StandInGpu) -> None:
    with read_by_the_host():
        for calls in (
            test_collectives.for_every_dtype_and_layout,
            test_collectives.reductions,
            test_collectives.averages_and_factors,
            test_collectives.uneven,
            test_collectives.coalesced,
            test_collectives.methods,
        ):
            calls()


def test_every_call_of_the_host_path(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 3, standin, tmp_path, every_call)


def script(gpu: StandInGpu, body: Callable[[], Any]) -> Any:
    with read_by_the_host():
        return body()


@pytest.mark.parametrize(
    "body", [scripts.ddp, scripts.fsdp2, scripts.tensor_parallel, scripts.pipeline, scripts.objects]
)
def test_scripts_end_as_on_gloo(pool: Pool, standin: Path, tmp_path: Path, body: Callable[[], Any]) -> None:
    theirs = run_on_host(pool, 2, body, backend="gloo")
    equal(run(pool, 2, standin, tmp_path, script, body), theirs, TWO_RANKS)


def order(gpu: StandInGpu) -> None:
    """Waits order streams and hold up nobody; futures are set at once, and their callbacks come behind the call."""
    n = dist.get_world_size()
    dist.all_reduce(torch.ones(1))  # connects, which takes all ranks
    for strided in (False, True):
        tensor, seen = torch.zeros(4, 2), torch.zeros(4, 2)
        gpu.copy_later(tensor, torch.full((4, 2), 1.0 + dist.get_rank()), LATER_S)
        target = tensor.view(2, 4).t() if strided else tensor
        if strided:
            gpu.synchronize()  # the copy that lays it out is torch's, which runs on the host at once
        work = dist.all_reduce(target, async_op=True)
        assert isinstance(work, DeviceWork)
        assert strided or not work.is_completed()
        future = work.get_future()
        assert future.done()
        future.then(lambda _, seen=seen, tensor=tensor: gpu.copy_later(seen, tensor, 0.0)).wait()
        work.wait()
        gpu.synchronize()
        assert work.is_completed()
        assert work.is_success()
        assert (tensor == n * (n + 1) / 2).all()
        assert (seen == n * (n + 1) / 2).all()
        assert future.wait() == [target] == work.result()


def waits(gpu: StandInGpu) -> None:
    """``wait`` with a timeout is the host's, also of a call on the current stream; other streams follow either."""
    dist.all_reduce(torch.ones(1))
    group = the_group()
    for async_op in (True, False):
        tensor, seen = torch.zeros(4), torch.zeros(4)
        options = c10d.AllreduceOptions()
        options.asyncOp = async_op
        gpu.copy_later(tensor, torch.ones(4), 4 * LATER_S)
        work = group.allreduce([tensor], options)
        with pytest.raises(TimeoutError):
            work.wait(timedelta(seconds=LATER_S / 10))
        assert not work.is_completed()
        gpu.stream, before = gpu.new_stream(), gpu.stream
        work.wait()
        gpu.copy_later(seen, tensor, 0.0)
        gpu.synchronize()
        assert (seen == dist.get_world_size()).all()
        gpu.stream = before
        work.wait(timedelta(seconds=TIMEOUT_S))
        assert work.is_completed()


def barriers(gpu: StandInGpu) -> None:
    group = the_group()
    dist.barrier()
    assert group._communicators._gpu is None  # on the host
    options = c10d.BarrierOptions()
    options.device = GPU
    group.barrier(options).wait()
    assert group._communicators.on(GPU)._backend._core.num_calls() == 1  # type: ignore[attr-defined]
    options.asyncOp = True
    work = group.barrier(options)
    work.wait()
    assert work.is_completed()


def everything_on_streams(gpu: StandInGpu) -> None:
    barriers(gpu)
    order(gpu)
    waits(gpu)


def test_order_on_streams(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 2, standin, tmp_path, everything_on_streams)


def exchanges(gpu: StandInGpu) -> None:
    """On NCCL, and on the stand-in, both ranks would wait for ever with their sends first."""
    rank, n = dist.get_rank(), dist.get_world_size()
    left, right = (rank - 1) % n, (rank + 1) % n
    operations = [
        *(dist.P2POp(dist.isend, torch.full((size,), float(rank + size)), right) for size in (1000, 5)),
        *(dist.P2POp(dist.irecv, torch.zeros(size), left) for size in (1000, 5)),
    ]
    for _ in range(2):  # a list that is used again
        works = dist.batch_isend_irecv(operations)
        assert len(works) == 4
        for work in works:
            work.wait()
        gpu.synchronize()
        for size, operation in zip((1000, 5), operations[2:], strict=True):
            assert (operation.tensor == left + size).all()
            operation.tensor.zero_()
        assert works[2]._source_rank() == left
    messages = the_group()._messages
    wrong = dist.P2POp(dist.isend, torch.zeros(2).to_sparse(), right)
    with pytest.raises(ValueError, match="to_dense"):
        dist.batch_isend_irecv([*operations[:1], wrong])
    assert len(messages._pending) == 1  # was not sent, and is not sent with the next
    works = dist.batch_isend_irecv(operations)
    assert not messages._pending
    for work in works:
        work.wait(timedelta(seconds=TIMEOUT_S))
    assert (operations[2].tensor == left + 1000).all()
    if rank == 0:
        dist.send(torch.full((3,), 7.0), 1)
    if rank == 1:
        received = torch.zeros(2, 6)[:, ::4]  # strided: what arrives is copied there
        tensor = torch.zeros(3)
        assert dist.recv(tensor, 0) == 0
        gpu.synchronize()
        assert (tensor == 7).all()
        dist.irecv(received, 0).wait()
        assert (received == 8).all()
    if rank == 0:
        dist.isend(torch.full((2, 2), 8.0), 1).wait()
        gpu.synchronize()
    with pytest.raises(ValueError, match="NCCL cannot receive from any source"):
        dist.recv(torch.zeros(1))


def unfinished_block(gpu: StandInGpu) -> None:
    group = the_group()
    group._start_coalescing(GPU)
    work = group.send([torch.ones(1)], 1 - dist.get_rank(), 0)
    with pytest.raises(RuntimeError, match="never enqueued"):
        work.wait()
    group._messages.start()
    group._collected = None
    group._messages.end(1.0)


def test_messages(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 2, standin, tmp_path / "two", exchanges)
    run(pool, 3, standin, tmp_path / "three", exchanges)
    run(pool, 2, standin, tmp_path / "block", unfinished_block)


def groups(gpu: StandInGpu) -> None:
    """A device_id connects at once; groups are made over the store, and by splitting where torch asks for that."""
    rank, n = dist.get_rank(), dist.get_world_size()
    whole = the_group()
    assert whole.supports_splitting
    whole.eager_connect_single_device(GPU)  # init_process_group's, which on this build refuses the device before
    assert whole.bound_device_id == GPU
    assert whole._communicators._gpu is not None
    with read_by_the_host():
        pair = dist.new_group([0, n - 1])  # connects at once, too
        if rank in (0, n - 1):
            total = torch.full((2,), float(rank))
            dist.all_reduce(total, group=pair)
            assert (total == n - 1).all()
            assert pair._communicators._gpu is not None
        with (
            patch("torch.accelerator.is_available", lambda: True),
            patch("torch.accelerator.current_accelerator", lambda: GPU),
        ):
            part = dist.split_group(split_ranks=[[0, 1]])
        assert (part is None) == (rank == 2)
        if part is not None:
            assert (part.rank(), part.size()) == (rank, 2)
            total = torch.ones(3)
            dist.all_reduce(total, group=part)
            assert (total == part.size()).all()
            assert part._communicators._gpu.name.startswith("torch.distributed 0 (cuda).0[")
            dist.barrier(group=part)
            assert dist.get_process_group_ranks(part) == [0, 1]
        everyone = [None] * n
        dist.all_gather_object(everyone, rank)
        assert everyone == list(range(n))


def test_groups(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 3, standin, tmp_path, groups)


def _group(comm: Communicator, folder: str, timeout_s: float) -> None:
    store = dist.FileStore(f"{folder}/torch", comm.world_size)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("pycomm", store=store, rank=comm.rank, world_size=comm.world_size, timeout=timeout)
    dist.all_reduce(torch.ones(1))


def failures(comm: Communicator, connection: Any, folder: str) -> None:
    with for_cuda_tensors(gpu_of(comm)):
        _group(comm, folder, TIMEOUT_S)
        apart = dist.new_group([0, 1])
        dist.all_reduce(torch.ones(1), group=apart)
        work = dist.all_reduce(torch.ones(2 + comm.rank), group=apart, async_op=True)
        future = work.get_future()
        assert future.done()  # had been enqueued before anybody knew
        with pytest.raises(MismatchError, match="all_reduce"):
            until_it_fails(work.wait)
        assert isinstance(work.exception(), MismatchError)
        assert not work.is_success()
        with pytest.raises(MismatchError):
            dist.all_reduce(torch.ones(1), group=apart)
        late = dist.new_group([0, 1], timeout=timedelta(seconds=0.5))
        dist.all_reduce(torch.ones(1), group=late, async_op=True).wait(timedelta(seconds=TIMEOUT_S))
        if comm.rank == 0:
            work = dist.all_reduce(torch.ones(1), group=late, async_op=True)
            with pytest.raises(PeerTimeoutError) as expired:
                until_it_fails(work.wait)
            assert expired.value.missing_ranks == [1]
            with pytest.raises(RuntimeError, match="PeerTimeoutError"):
                work.get_future().wait()  # asked for afterwards
            dist.send(torch.ones(1), 1)
            work = dist.all_reduce(torch.ones(1), async_op=True)
            connection.send("waiting")
            with pytest.raises(PeerLostError, match="rank 1"):
                until_it_fails(work.wait)
        else:
            dist.recv(torch.ones(1), 0)
            connection.recv()


def test_failures(standin: Path, tmp_path: Path) -> None:
    with ranks(2, standin, tmp_path, failures, str(tmp_path), timeout_s=TIMEOUT_S) as group:
        received = group.connections[0].recv()
        assert received == "waiting", received
        os.kill(group.pids[1], signal.SIGKILL)
        outcome, _ = group.result(0)
        assert outcome is None, outcome
