"""broadcast, barrier, split and symmetric memory over real processes."""

from __future__ import annotations

import gc

import pytest
import torch

import pycomm
from pycomm import Communicator
from tests.pool import Pool

COUNTS = [0, 1, 3, 2000, 40_001, 300_007]


def broadcast_all(comm: Communicator, symmetric: bool, async_op: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int64):
        for root in range(comm.world_size):
            for count in COUNTS:
                expected = torch.arange(count).add(17 * root).to(dtype)
                tensor = comm.empty(count, dtype=dtype) if symmetric else torch.empty(count, dtype=dtype)
                tensor.copy_(expected if comm.rank == root else torch.zeros(count))
                work = comm.broadcast(tensor, root, async_op=async_op)
                if work is not None:
                    work.wait()
                assert torch.equal(tensor, expected), (dtype, root, count)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_broadcast(pool: Pool, world_size: int, symmetric: bool) -> None:
    for async_op in (False, True):
        pool.run(world_size, broadcast_all, symmetric, async_op)


def overwrite_after_broadcast(comm: Communicator) -> None:
    """The root may change its tensor as soon as broadcast returns."""
    for memory in (comm.empty(200_000), torch.empty(200_000), torch.empty(500)):
        for turn in range(20):
            memory.fill_(float(turn) if comm.rank == 0 else -1.0)
            comm.broadcast(memory)
            assert (memory == float(turn)).all()
            memory.fill_(-2.0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_root_may_overwrite_at_once(pool: Pool, world_size: int) -> None:
    pool.run(world_size, overwrite_after_broadcast)


def barrier_orders(comm: Communicator) -> None:
    """What a rank writes before a barrier, a peer reads after it."""
    board = comm.empty(8, dtype=torch.int64)
    boards = comm.peers(board)
    for turn in range(50):
        board.fill_(turn)
        comm.barrier()
        assert all((other == turn).all() for other in boards)
        comm.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_barrier(pool: Pool, world_size: int) -> None:
    pool.run(world_size, barrier_orders)


def split_halves(comm: Communicator) -> None:
    parity = comm.rank % 2
    half = comm.split(parity, key=-comm.rank)  # in reverse order
    assert half is not None
    members = [r for r in reversed(range(comm.world_size)) if r % 2 == parity]
    assert (half.rank, half.world_size) == (members.index(comm.rank), len(members))
    for tensor in (torch.full((30_000,), float(comm.rank)), torch.full((3,), float(comm.rank))):
        half.all_reduce(tensor)
        assert (tensor == float(sum(members))).all()
    deeper = half.split(0)
    assert deeper is not None
    deeper.barrier()
    only_zero = comm.split(0 if comm.rank == 0 else None)
    assert (only_zero is None) == (comm.rank != 0)
    assert len({comm.name, half.name, deeper.name}) == 3
    for group in (deeper, half):
        group.close()
    comm.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_split(pool: Pool, world_size: int) -> None:
    pool.run(world_size, split_halves)


def overlapping_groups(comm: Communicator) -> None:
    """Two groups that share ranks, and the group they come from, with asynchronous calls on all three."""
    left = comm.split(0 if comm.rank <= 1 else None)
    right = comm.split(0 if comm.rank >= 1 else None)
    tensors = []
    for group in (left, comm, right):
        if group is not None:
            tensor = torch.full((50_000,), 1.0)
            tensors.append((group, tensor, group.all_reduce(tensor, async_op=True)))
    for group, tensor, work in tensors:
        work.wait()
        assert (tensor == float(group.world_size)).all()
    comm.barrier()


def test_overlapping_groups(pool: Pool) -> None:
    pool.run(3, overlapping_groups)


def symmetric_lifetime(comm: Communicator) -> None:
    first = comm.empty(1000, 7)
    address = first.data_ptr()
    assert first.shape == (1000, 7)
    peers = comm.peers(first[10:20])
    assert len(peers) == comm.world_size
    assert peers[comm.rank].data_ptr() == first[10:20].data_ptr()
    view = first[5:6]  # keeps the memory
    del first, peers
    gc.collect()
    comm.barrier()
    second = comm.empty(1000, 7)
    assert second.data_ptr() != address
    del view
    gc.collect()
    comm.barrier()
    third = comm.empty(6990)  # fits into what all have given back
    assert third.data_ptr() == address
    assert comm.empty(0).numel() == 0
    with pytest.raises(ValueError, match="comm.empty"):
        comm.peers(torch.ones(3))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_symmetric_memory_is_reused_once_all_have_freed_it(pool: Pool, world_size: int) -> None:
    pool.run(world_size, symmetric_lifetime)


def mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as file:
        return sum("pycomm" in line for line in file)


def allocate_many(comm: Communicator) -> tuple[int, int]:
    comm.empty(10)
    before = mappings()
    for turn in range(60):
        tensor = comm.empty(5000 * (turn % 7 + 1))
        tensor.fill_(1.0)
        comm.all_reduce(tensor)
    return before, mappings()


def test_freed_segments_do_not_pile_up(pool: Pool) -> None:
    for before, after in pool.run(2, allocate_many):
        assert after <= before + 3


def too_much_memory(comm: Communicator) -> None:
    with pytest.raises(MemoryError, match="Nothing was allocated"):
        comm.empty(1 << 50)
    tensor = comm.empty(100)  # and the communicator goes on
    tensor.fill_(1.0)
    comm.all_reduce(tensor)
    assert (tensor == comm.world_size).all()


def test_more_memory_than_there_is(pool: Pool) -> None:
    pool.run(2, too_much_memory)


def tensors_outlive_the_communicator() -> None:
    comm = pycomm.init()
    tensor = comm.empty(1000)
    comm.close()
    comm.close()
    tensor.fill_(3.0)
    assert tensor.sum() == 3000.0


def test_close_does_not_unmap_live_tensors() -> None:
    tensors_outlive_the_communicator()
