"""torch.distributed's back end "pycomm" on CUDA tensors over NCCL: one rank on any machine with a GPU, two on two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.gpu.helpers import needs_gpus
from tests.torch_backend import test_collectives
from tests.torch_backend.helpers import torch_distributed

WORLDS = [1, pytest.param(2, marks=needs_gpus(2))]
SLEEP_CYCLES = 200_000_000  # about a tenth of a second


def on_gpus(comm, store, body):
    torch.cuda.set_device(comm.rank)
    with torch_distributed(comm, "pycomm", store), torch.device("cuda", comm.rank):
        return body()


def run(pool, world, tmp_path, body):
    return pool.run(world, on_gpus, str(tmp_path / "store"), body)


def every_call():
    test_collectives.for_every_dtype_and_layout()
    test_collectives.reductions()
    test_collectives.averages_and_factors()
    test_collectives.uneven()
    test_collectives.coalesced()
    test_collectives.methods()


@pytest.mark.parametrize("world", WORLDS)
def test_every_call(pool, world, tmp_path):
    run(pool, world, tmp_path, every_call)


def order():
    n = dist.get_world_size()
    dist.all_reduce(torch.ones(1))  # connects
    tensor = torch.zeros(1 << 20)
    torch.cuda._sleep(SLEEP_CYCLES)
    tensor.fill_(1)
    work = dist.all_reduce(tensor, async_op=True)
    assert not work.is_completed()
    future = work.get_future()
    assert future.done()
    doubled = future.then(lambda done: done.value()[0] * 2)  # on a stream of the callback's
    assert not work.is_completed()
    assert doubled.wait().eq(2 * n).all()
    work.wait()
    total = tensor.sum()
    assert total.item() == n * tensor.numel()
    assert work.is_completed()
    with torch.cuda.stream(torch.cuda.Stream()):  # strided: what arrives is copied where the Work is waited for
        strided = torch.zeros(64, 64).t()[::2]
        torch.cuda._sleep(SLEEP_CYCLES)
        strided.fill_(1)
        work = dist.all_reduce(strided, async_op=True)
    work.wait()
    assert strided.eq(n).all()
    dist.barrier(device_ids=[dist.get_rank()])
    everyone = [None] * n
    dist.all_gather_object(everyone, torch.ones(2) * dist.get_rank())  # over the host
    assert [objects[0].item() for objects in everyone] == list(range(n))
    assert dist.get_default_backend_for_device("cpu")  # torch is as it was


@pytest.mark.parametrize("world", WORLDS)
def test_order_on_streams(pool, world, tmp_path):
    run(pool, world, tmp_path, order)


def train(wrap):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(4):
        torch.manual_seed(step)
        loss = model(torch.randn(16, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(model):
    mesh = init_device_mesh(torch.get_default_device().type, (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh)


def training():
    """All ranks have one batch, so DDP, FSDP2 and a model alone see the same gradients, but for roundings of means."""
    alone = train(lambda model: model)
    for wrap in (lambda model: DistributedDataParallel(model, bucket_cap_mb=0.001), sharded):
        torch.testing.assert_close(train(wrap), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_ddp_and_fsdp2(pool, world, tmp_path):
    run(pool, world, tmp_path, training)


def exchange():
    rank, n = dist.get_rank(), dist.get_world_size()
    dist.all_reduce(torch.ones(1))
    mine, theirs = torch.full((1 << 22,), float(rank)), torch.zeros(1 << 22)
    operations = [dist.P2POp(dist.isend, mine, (rank + 1) % n), dist.P2POp(dist.irecv, theirs, (rank - 1) % n)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert theirs.eq((rank - 1) % n).all()


@pytest.mark.parametrize("world", WORLDS)
def test_a_batch_of_messages(pool, world, tmp_path):
    run(pool, world, tmp_path, exchange)


def bound(comm, store):
    torch.cuda.set_device(comm.rank)
    device = torch.device("cuda", comm.rank)
    ranks = {"store": dist.FileStore(store, comm.world_size), "rank": comm.rank, "world_size": comm.world_size}
    dist.init_process_group("pycomm", **ranks, device_id=device)
    try:
        assert dist.group.WORLD._communicators._gpu is not None
        mesh = init_device_mesh("cuda", (1, comm.world_size), mesh_dim_names=("dp", "tp"))  # splits
        for name, size in (("dp", 1), ("tp", comm.world_size)):
            total = torch.ones(3, device=device)
            dist.all_reduce(total, group=mesh[name].get_group())
            assert total.eq(size).all()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", WORLDS)
def test_a_device_id_connects_at_once_and_meshes_split(pool, world, tmp_path):
    pool.run(world, bound, str(tmp_path / "store"))
