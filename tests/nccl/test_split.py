"""Groups split from a group, on NCCL over the stand-in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pycomm import Communicator, DataParallel, Mesh
from pycomm.backends.nccl import watchdog
from pycomm.errors import MismatchError, PeerLostError
from tests.nccl.helpers import read_by_the_host, run, until_it_fails
from tests.pool import Pool


def halves(comm: Communicator) -> None:
    rank, n = comm.rank, comm.world_size
    part = comm.split(rank % 2 - 7, key=-rank)  # colors are any numbers
    assert part is not None
    members = [r for r in reversed(range(n)) if r % 2 == rank % 2]
    assert (part.rank, part.world_size, part.backend) == (members.index(rank), len(members), "nccl")
    tensor, whole = torch.full((3,), float(rank)), torch.ones(2)
    part.all_reduce(tensor)
    comm.all_reduce(whole)
    part.synchronize()
    comm.synchronize()
    assert (tensor == sum(members)).all()
    assert (whole == n).all()
    pieces = torch.empty(len(members), dtype=torch.int64)
    part.all_gather(pieces, torch.tensor([rank]))
    part.synchronize()
    assert pieces.tolist() == members
    nested = part.split(part.rank)
    assert nested is not None
    assert nested.world_size == 1
    nested.barrier()
    lonely = comm.split(None if rank else 3)
    assert (lonely is None) == (rank != 0)
    for group in (nested, part, lonely):
        if group is not None:
            group.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_split(pool: Pool, standin: Path, tmp_path: Path, size: int) -> None:
    run(pool, size, standin, tmp_path, halves)


def a_part_that_fails(comm: Communicator) -> None:
    """What ends one group leaves the others alone."""
    part = comm.split(comm.rank // 2)
    other = comm.split(0)
    assert part is not None
    assert other is not None
    if comm.rank < 2:
        part.all_reduce(torch.ones(2 + part.rank))
        with pytest.raises(MismatchError, match=r"group 'world.0\[0\]'") as caught:
            until_it_fails(part.synchronize)
        assert sorted(caught.value.calls) == [0, 1]
    other.barrier()
    if other.rank == 3:
        other.abort("enough")
    with pytest.raises(PeerLostError, match="rank 3 aborted: enough"):
        until_it_fails(other.synchronize)
    time.sleep(4 * watchdog._LOOK_S)  # what spread to another group would be found by now
    if comm.rank >= 2:
        part.barrier()
    comm.barrier()


def test_a_part_that_fails_leaves_the_others_alone(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 4, standin, tmp_path, a_part_that_fails)


def train(comm: Communicator) -> torch.Tensor:
    """Layers of pycomm above the back end run on it as they are."""
    mesh = Mesh(comm, dp=2, pp=1, tp=2)
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    ddp = DataParallel(model, mesh.dp, bucket_mb=0.0001)
    for step in range(3):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + mesh.dp_rank))
        ddp(inputs).square().mean().backward()
        with torch.no_grad():
            for parameter in ddp.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
        ddp.zero_grad()
    total = ddp(torch.ones(1, 6)).detach().sum().reshape(1)
    mesh.tp.all_reduce(total)
    return total


def train_on_nccl(comm: Communicator) -> torch.Tensor:
    with read_by_the_host():
        return train(comm)


def test_layers_above_run_on_it(pool: Pool, standin: Path, tmp_path: Path) -> None:
    on_the_host = pool.run(4, train)
    on_nccl = run(pool, 4, standin, tmp_path, train_on_nccl)
    for a, b in zip(on_the_host, on_nccl, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)  # sums of two: the same in any order, up to their averaging
