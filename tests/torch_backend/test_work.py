"""Asynchronous calls: completion that needs nobody to wait, futures, threads, timeouts, and ranks that are gone."""

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

import pycomm
from pycomm import _C
from pycomm.errors import MismatchError, PeerLostError, PeerTimeoutError
from tests.processes import Ranks
from tests.torch_backend.helpers import run

NEVER_S = 60.0  # a wait that ends only because it should


def futures():
    rank, n = dist.get_rank(), dist.get_world_size()
    total = n * (n + 1) / 2
    tensors = [torch.full((size,), rank + 1.0) for size in (1, 1000, 300_000)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    done = threading.Event()
    called_in = []

    def callback(future):
        called_in.append(threading.current_thread().name)
        done.set()
        return future.value()[0] * 2

    doubled = works[-1].get_future().then(callback)
    assert done.wait(NEVER_S)  # nobody waits for the Work
    assert torch.equal(doubled.wait(), torch.full((300_000,), 2 * total))
    for work, tensor in zip(works, tensors, strict=True):
        assert work.get_future() is work.get_future()
        assert work.get_future().wait()[0] is tensor
        assert (work.wait(), work.is_completed(), work.is_success(), work.exception()) == (True, True, True, None)
        assert work.result() == [tensor]
        assert tensor.eq(total).all()
    # What is left to do after the operation is done for a future, too: here into a strided tensor.
    strided = torch.full((4, 3), float(rank)).t()
    output = dist.all_reduce(strided, async_op=True).get_future().wait()[0]
    assert output is strided
    assert strided.eq(n * (n - 1) / 2).all()
    gathered = [torch.zeros(2) for _ in range(n)]
    dist.all_gather(gathered, torch.full((2,), float(rank)), async_op=True).get_future().wait()
    assert [tensor[0].item() for tensor in gathered] == list(range(n))
    # A call without asyncOp is over when it returns; its future, too.
    return called_in, [thread.name for thread in threading.enumerate()].count("pycomm-futures")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_futures_complete_by_themselves_in_one_thread(pool, world_size):
    for called_in, num_threads in run(pool, world_size, futures):
        assert num_threads <= 1
        # In the completion thread, unless all was over when the callback was added.
        assert set(called_in) <= {"pycomm-futures", "MainThread"}


def out_of_order():
    """A future of an operation that waits does not hold back those of others that are over."""
    rank = dist.get_rank()
    late, early = torch.zeros(1), torch.zeros(1)
    if rank == 0:
        waiting = dist.irecv(late, 1, tag=1).get_future()
        group = dist.new_group([0, 1])
        dist.irecv(early, 1, tag=2).get_future().wait()
        dist.all_reduce(early, group=group, async_op=True).get_future().wait()
        assert not waiting.done()
        dist.send(early, 1)
        waiting.wait()
    else:
        group = dist.new_group([0, 1])
        dist.send(torch.ones(1), 0, tag=2)
        dist.all_reduce(torch.ones(1), group=group)
        dist.recv(early, 0)
        dist.send(torch.ones(1), 0, tag=1)
    return late.item(), early.item()


def test_futures_do_not_wait_for_each_other(pool):
    assert run(pool, 2, out_of_order) == [(1.0, 2.0), (0.0, 2.0)]


def timeouts():
    rank = dist.get_rank()
    tensor = torch.zeros(1)
    if rank == 0:
        work = dist.irecv(tensor, 1)
        with pytest.raises(TimeoutError):
            work.wait(timedelta(milliseconds=1))
        assert not work.is_completed()
        dist.send(tensor, 1)
        work.wait(timedelta(seconds=NEVER_S))  # the first wait did not end the operation
    else:
        dist.recv(tensor, 0)
        dist.send(torch.ones(1), 0)
    return tensor.item()


def test_a_wait_that_runs_out_can_be_repeated(pool):
    assert run(pool, 2, timeouts) == [1.0, 0.0]


def mismatch():
    tensor = torch.zeros(1 + dist.get_rank())
    with pytest.raises(MismatchError) as raised:
        dist.all_reduce(tensor)
    work = dist.all_reduce(tensor, async_op=True)
    with pytest.raises(RuntimeError, match="MismatchError"):  # a future keeps an error's name and words
        work.get_future().wait()
    with pytest.raises(MismatchError):
        work.wait()
    assert isinstance(work.exception(), MismatchError)
    assert not work.is_success()
    dist.barrier()  # the group stays usable
    return sorted(raised.value.calls)


def test_mismatched_calls_are_named(pool):
    assert run(pool, 2, mismatch) == [[0, 1], [0, 1]]


def from_many_threads():
    """Groups of their own per thread, futures of all in the one completion thread."""
    n = dist.get_world_size()
    groups = [dist.new_group(list(range(n))) for _ in range(4)]
    sums = torch.zeros(len(groups), 50)

    def work(index):
        for step in range(50):
            tensor = torch.full((100,), float(step))
            dist.all_reduce(tensor, group=groups[index], async_op=True).get_future().wait()
            sums[index, step] = tensor[0]

    with ThreadPoolExecutor(len(groups)) as threads:
        list(threads.map(work, range(len(groups))))  # raises what went wrong in any of them
    return torch.equal(sums, n * torch.arange(50.0).expand_as(sums))


def test_threads(pool):
    assert run(pool, 2, from_many_threads) == [True, True]


def test_completions_in_the_extension():
    completions = _C.Completions()
    with pycomm.init() as comm:
        works = [comm.all_reduce(torch.ones(3), async_op=True) for _ in range(3)]
        for token, work in enumerate(works):
            work.announce(completions, token)
            work.announce(completions, token)  # as often as asked
        assert sorted(completions.take() for _ in range(6)) == [0, 0, 1, 1, 2, 2]
        for work in works:
            work.wait()
        works[0].announce(completions, 7)  # over already
        assert completions.take() == 7
        completions.close()
        assert completions.take() is None


# A rank that is gone. Each starts its own processes: they do not come back.


def _group(comm, connection, **options):
    store = dist.FileStore(connection.recv(), comm.world_size)
    dist.init_process_group("pycomm", store=store, rank=comm.rank, world_size=comm.world_size, **options)


def dies_in_training(comm, connection):
    _group(comm, connection)
    model = DistributedDataParallel(nn.Linear(3, 3))
    for _ in range(2):  # the second step rebuilds the buckets, after which only gradients travel
        model(torch.ones(1, 3)).sum().backward()
    dist.barrier()
    if comm.rank == 1:
        os._exit(0)
    said = []
    for attempt in (
        lambda: model(torch.ones(1, 3)).sum().backward(),
        lambda: dist.all_reduce(torch.ones(1)),
        lambda: dist.all_reduce(torch.ones(1), async_op=True).wait(),
    ):
        try:
            attempt()
        except RuntimeError as error:
            said.append((isinstance(error, PeerLostError), "PeerLostError" in f"{type(error)}{error}", str(error)))
    return said


def test_a_lost_rank_ends_a_training_step(tmp_path):
    with Ranks(tmp_path, 2, dies_in_training) as ranks:
        for connection in ranks.connections:
            connection.send(str(tmp_path / "torch"))
        said, _ = ranks.result(0)
    assert len(said) == 3
    assert [is_one for is_one, _, _ in said] == [False, True, True]  # DDP waits in C++, where futures lose the type
    for _, named, text in said:
        assert named
        assert "rank 1" in text


def late(comm, connection):
    _group(comm, connection, timeout=timedelta(seconds=20))
    if comm.rank == 0:
        dist.group.WORLD.set_timeout(timedelta(milliseconds=100))
        with pytest.warns(UserWarning, match="only supported for"):
            _set_pg_timeout(timedelta(milliseconds=100))  # torch's own way knows gloo and NCCL only
        with pytest.raises(PeerTimeoutError) as raised:
            dist.all_reduce(torch.ones(1))
        return raised.value.missing_ranks, raised.value.op
    with contextlib.suppress(EOFError):
        connection.recv()  # does not call until the test is over
    return None


def test_timeouts_name_who_is_missing(tmp_path):
    with Ranks(tmp_path, 2, late) as ranks:
        for connection in ranks.connections:
            connection.send(str(tmp_path / "torch"))
        (missing, op), _ = ranks.result(0)
    assert missing == [1]
    assert "all_reduce" in op


def test_import_is_enough_and_brings_nothing_heavy():
    code = """
import sys, pycomm, torch.distributed as dist
assert dist.is_backend_available("pycomm")
assert "pycomm.torch_backend.process_group" not in sys.modules
dist.init_process_group("pycomm", store=dist.HashStore(), rank=0, world_size=1)
import torch
tensor = torch.ones(3)
dist.all_reduce(tensor, async_op=True).get_future().wait()
print(dist.get_backend(), tensor.tolist())
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "pycomm [1.0, 1.0, 1.0]\n", "")
