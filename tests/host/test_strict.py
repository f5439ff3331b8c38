"""strict=True rejects on the host what would hang on NCCL; strict=False lets it pass."""

from __future__ import annotations

import pytest
import torch

import pycomm
from pycomm import Communicator
from pycomm.errors import StrictOrderError
from tests.pool import Pool, file_store


def crossed_order(comm: Communicator) -> list[str]:
    """Ranks issue on two groups in opposite orders; asynchronous, so that the host can go on."""
    first, second = comm.split(0), comm.split(0)
    assert first is not None
    assert second is not None
    groups = (first, second) if comm.rank == 0 else (second, first)
    tensors = [torch.full((count,), 1.0) for count in (10, 50_000)]
    works = {group.name: group.all_reduce(tensors[group is second], async_op=True) for group in groups}
    messages = []
    for name in sorted(works):
        with pytest.raises(StrictOrderError) as caught:
            works[name].wait()
        messages.append(str(caught.value))
    assert all((tensor == 1.0).all() for tensor in tensors)  # nothing was written
    for group in (first, second):  # and both go on
        group.all_reduce(tensors[0])
    assert (tensors[0] == comm.world_size**2).all()
    return messages


@pytest.mark.parametrize("world_size", [2, 3])
def test_crossed_orders_are_rejected_on_every_rank(pool: Pool, world_size: int) -> None:
    results = pool.run(world_size, crossed_order)
    assert all(messages == results[0] for messages in results)
    assert "between ranks 0 and 1" in results[0][0]


def crossed_order_without_strict(comm: Communicator, path: str) -> None:
    free = pycomm.init(store=file_store(path, comm.world_size), rank=comm.rank, world_size=comm.world_size)
    first, second = free.split(0), free.split(0)
    assert first is not None
    assert second is not None
    works = []
    for group in (first, second) if comm.rank == 0 else (second, first):
        tensor = torch.ones(10)
        works.append((tensor, group.all_reduce(tensor, async_op=True)))
    for tensor, work in works:
        work.wait()
        assert (tensor == comm.world_size).all()
    for group in (first, second, free):
        group.close()


def test_without_strict_they_pass(pool: Pool, tmp_path: object) -> None:
    pool.run(2, crossed_order_without_strict, f"{tmp_path}/store")
