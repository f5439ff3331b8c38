"""The torch back end over several hosts: futures, DDP, and operations that are announced when they are over."""

from __future__ import annotations

import tempfile
import threading
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pycomm import _C, Communicator
from pycomm.errors import MismatchError
from tests.hosts.helpers import Hosts
from tests.pool import TIMEOUT_S
from tests.torch_backend.test_collectives import averages_and_factors, uneven
from tests.torch_backend.test_work import futures


def steps_of_ddp() -> list[torch.Tensor]:
    """Gradients of a few steps: each rank has rows of its own, so DDP's averages are those of all rows."""
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 1))
    rows = torch.randn(3, n, 4, 6)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in rows:
        optimizer.zero_grad()
        wrapped(step[rank]).square().mean().backward()
        optimizer.step()
    alone = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 1))
    torch.manual_seed(1)
    for module in alone:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in rows:
        optimizer.zero_grad()
        alone(step.reshape(-1, 6)).square().mean().backward()
        optimizer.step()
    for ours, expected in zip(model.parameters(), alone.parameters(), strict=True):
        # Gradients are means of at most 12 terms below 8: 3 steps of a few roundings each, 2**-24 of the values.
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    return list(model.parameters())


def in_torch(comm: Communicator, _: Any, layout: str, store: str) -> None:
    with patch("pycomm.records.host_identity", lambda: layout[comm.rank]):
        dist.init_process_group(
            "pycomm",
            store=dist.FileStore(store, comm.world_size),
            rank=comm.rank,
            world_size=comm.world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
    futures()
    steps_of_ddp()
    averages_and_factors()
    uneven()
    tensor = torch.zeros(1 + comm.rank)
    with pytest.raises(RuntimeError, match="MismatchError"):
        dist.all_reduce(tensor, async_op=True).get_future().wait()
    dist.barrier()
    dist.destroy_process_group()


def test_futures_and_ddp() -> None:
    """Catches operations that cannot be announced: DDP and ``get_future`` need that."""
    with tempfile.TemporaryDirectory() as folder, Hosts("aab", in_torch, "aab", f"{folder}/store") as hosts:
        hosts.results()


def announced(comm: Communicator, _: Any) -> None:
    """Every kind of operation of this back end comes out of Completions, once for each time that it was asked for."""
    completions, n, rank = _C.Completions(), comm.world_size, comm.rank
    here = torch.ones(70_000)
    works = [
        comm.all_reduce(here, async_op=True),
        comm.send(torch.ones(5), (rank + 1) % n, async_op=True),
        comm.recv(torch.ones(5), (rank - 1) % n, async_op=True),
        comm.recv(torch.ones(70_000), None, 3, async_op=True),
        comm.send(here.clone(), (rank + 1) % n, 3, async_op=True),
    ]
    with comm.batch(async_op=True) as batch:
        for peer in range(n):
            batch.send(torch.full((3,), float(rank)), peer, 5)
        received = [torch.zeros(3) for _ in range(n)]
        for peer in range(n):
            batch.recv(received[peer], peer, 5)
    works.append(batch.work)
    with comm.batch(async_op=True) as batch:
        pass
    works.append(batch.work)
    for token, work in enumerate(works):
        work.announce(completions, token)
        work.announce(completions, token)
    assert sorted(completions.take() for _ in range(2 * len(works))) == sorted(2 * list(range(len(works))))
    for token, work in enumerate(works):
        assert work.done()
        work.wait()
        work.announce(completions, token)  # over already
        assert completions.take() == token
    assert [int(tensor[0]) for tensor in received] == list(range(n))
    assert works[3].source == (rank - 1) % n
    if rank < 2:  # one that fails is over, too
        work = comm.send(here, 1, async_op=True) if rank == 0 else comm.recv(here.double(), 0, async_op=True)
        work.announce(completions, 9)
        assert completions.take() == 9
        with pytest.raises(MismatchError):
            work.wait()
    closer = threading.Timer(0.0, completions.close)
    closer.start()
    assert completions.take() is None
    closer.join()
    comm.barrier()


@pytest.mark.parametrize(("layout", "backend"), [("aab", "auto"), ("ab", "gloo")])
def test_operations_are_announced(layout: str, backend: str) -> None:
    with Hosts(layout, announced, backend=backend) as hosts:
        hosts.results()
