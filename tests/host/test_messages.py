"""send, recv and batch over real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pycomm
from pycomm import Communicator
from pycomm.errors import MismatchError
from tests.pool import Pool, file_store
from tests.processes import Ranks

# Eager, just above it, larger than the ring that streams, and no multiple of anything.
COUNTS = [0, 1, 7, 1000, 4097, 8193, 70_001, 700_003]


def values(count: int, source: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(count).add(31 * source).remainder(97).to(dtype)


def place(comm: Communicator, tensor: torch.Tensor, memory: str) -> torch.Tensor:
    if memory == "ordinary":
        return tensor
    symmetric = comm.empty(*tensor.shape, dtype=tensor.dtype)
    symmetric.copy_(tensor)
    return symmetric


def ring(comm: Communicator, memory: str) -> None:
    """Everyone sends to the right and receives from the left, in one batch."""
    left, right = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool):
        for count in COUNTS:
            mine = place(comm, values(count, comm.rank, dtype), memory)
            theirs = torch.zeros(count, dtype=dtype)
            with comm.batch() as batch:
                batch.send(mine, right)
                batch.recv(theirs, left)
            assert batch.sources == [right, left]
            assert torch.equal(theirs, values(count, left, dtype)), (dtype, count)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("memory", ["ordinary", "symmetric"])
def test_ring(pool: Pool, world_size: int, memory: str) -> None:
    pool.run(world_size, ring, memory)


def one_way(comm: Communicator, memory: str) -> None:
    for count in COUNTS:
        tensor = place(comm, values(count, 0), memory)
        if comm.rank == 0:
            for dst in range(1, comm.world_size):
                comm.send(tensor, dst, tag=count)
                tensor.add_(0.0)  # it may be touched again
        else:
            tensor.zero_()
            assert comm.recv(tensor, 0, tag=count) == 0
            assert torch.equal(tensor, values(count, 0))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("memory", ["ordinary", "symmetric"])
def test_blocking_send_and_recv(pool: Pool, world_size: int, memory: str) -> None:
    pool.run(world_size, one_way, memory)


def tags_in_any_order(comm: Communicator) -> None:
    """More messages than a channel has room for, received in the opposite order of their tags."""
    counts = [5, 70_001] * 30
    if comm.rank == 0:
        works = [comm.send(values(count, tag), 1, tag, async_op=True) for tag, count in enumerate(counts)]
        for work in works:
            work.wait()
    elif comm.rank == 1:
        for tag in reversed(range(len(counts))):
            tensor = torch.empty(counts[tag])
            comm.recv(tensor, 0, tag)
            assert torch.equal(tensor, values(counts[tag], tag))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_tag_never_blocks_another(pool: Pool, world_size: int) -> None:
    pool.run(world_size, tags_in_any_order)


def fifo(comm: Communicator) -> None:
    """Of one tag, in order: small ones do not overtake large ones."""
    counts = [70_001, 3, 70_001, 3, 3]
    if comm.rank == 0:
        for number, count in enumerate(counts):
            comm.send(torch.full((count,), float(number)), 1)
    else:
        for number, count in enumerate(counts):
            tensor = torch.empty(count)
            comm.recv(tensor, 0)
            assert (tensor == number).all()


def test_one_tag_is_first_in_first_out(pool: Pool) -> None:
    pool.run(2, fifo)


def from_any_source(comm: Communicator) -> list[int]:
    sources = []
    for count in (3, 70_001):
        if comm.rank == 0:
            for _ in range(1, comm.world_size):
                tensor = torch.empty(count)
                source = comm.recv(tensor)
                assert torch.equal(tensor, values(count, source))
                sources.append(source)
            work = comm.recv(torch.empty(1), tag=9, async_op=True)
            comm.send(torch.ones(1), 1, tag=8)
            work.wait()
            assert work.source == 1
        else:
            comm.send(values(count, comm.rank), 0)
            if comm.rank == 1:
                comm.recv(torch.empty(1), 0, tag=8)
                comm.send(torch.ones(1), 0, tag=9)
        comm.barrier()  # else a fast rank's next message may match a receive of this round
    return sources


@pytest.mark.parametrize("world_size", [2, 4])
def test_from_any_source(pool: Pool, world_size: int) -> None:
    sources = pool.run(world_size, from_any_source)[0]
    others = list(range(1, world_size))
    assert sorted(sources) == sorted(2 * others)


def async_exchange(comm: Communicator) -> None:
    """recv then send on both sides, asynchronous; and collectives meanwhile."""
    peer = 1 - comm.rank
    for count in COUNTS:
        theirs = torch.empty(count)
        receiving = comm.recv(theirs, peer, async_op=True)
        total = torch.ones(count)
        comm.all_reduce(total)
        sending = comm.send(values(count, comm.rank), peer, async_op=True)  # nobody else keeps the tensor
        receiving.wait()
        sending.wait()
        assert receiving.source == peer
        assert torch.equal(theirs, values(count, peer))
        assert (total == 2).all()


def test_asynchronous_exchange_and_collectives(pool: Pool) -> None:
    pool.run(2, async_exchange)


def sleeps_of_the_messages_thread() -> int:
    """How often it has given up its core to wait."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "pycomm-messages":
            lines = (task / "status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))
    return 0


def copy_asynchronously(comm: Communicator) -> int:
    peer = 1 - comm.rank
    mine = comm.empty(32_000_000).fill_(comm.rank)
    theirs = torch.full_like(mine, -1.0)
    comm.barrier()
    before = sleeps_of_the_messages_thread()
    work = comm.recv(theirs, peer, async_op=True)
    comm.send(mine, peer, async_op=True)
    work.wait()
    after = sleeps_of_the_messages_thread()
    assert (theirs == peer).all()
    comm.barrier()
    return after - before


def test_copying_in_place_never_sleeps_between_chunks(pool: Pool) -> None:
    """128 chunks of 1 MB. What it may sleep for is the offer, the reply and the lock."""
    assert max(pool.run(2, copy_asynchronously)) < 16


def disagreement(comm: Communicator) -> dict[int, str]:
    peer = 1 - comm.rank
    for count in (4, 70_001):
        theirs = torch.full((count + comm.rank,), -1.0)
        with pytest.raises(MismatchError) as caught:
            if comm.rank == 0:
                comm.send(torch.ones(count), peer)
            else:
                comm.recv(theirs, peer)
        assert (theirs == -1.0).all()
    with comm.batch() as batch:  # and the communicator goes on
        batch.send(torch.ones(3), peer)
        batch.recv(torch.empty(3), peer)
    return caught.value.calls


def test_sides_that_disagree_are_both_told(pool: Pool) -> None:
    for calls in pool.run(2, disagreement):
        assert calls == {0: "send(dst=1, tag=0, float32[70001])", 1: "recv(src=0, tag=0, float32[70002])"}


def wrong_arguments(comm: Communicator) -> None:
    for peer in (-1, comm.world_size):
        with pytest.raises(ValueError, match=f"dst is {peer}"):
            comm.send(torch.ones(1), peer)
        with pytest.raises(ValueError, match=f"src is {peer}"):
            comm.recv(torch.ones(1), peer)
    with pytest.raises(ValueError, match="not contiguous"):
        comm.send(torch.ones(4, 4).t(), 0)
    with pytest.raises(ValueError, match="dst is 99"):
        with comm.batch() as batch:
            batch.recv(torch.ones(1), 0)
            batch.send(torch.ones(1), 99)
    with comm.batch() as batch:
        pass
    assert batch.sources == []
    assert comm.batch(async_op=True).work is None
    with comm.batch(async_op=True) as batch:
        pass
    assert batch.work is not None
    batch.work.wait()


@pytest.mark.parametrize("world_size", [1, 2])
def test_wrong_arguments_send_nothing(pool: Pool, world_size: int) -> None:
    pool.run(world_size, wrong_arguments)


def without_strict(comm: Communicator, path: str) -> None:
    """Small sends return at once, received or not."""
    store = file_store(path, comm.world_size)
    with pycomm.init(store=store, rank=comm.rank, world_size=comm.world_size) as free:
        peer = 1 - comm.rank
        for number in range(10):
            free.send(torch.full((5,), float(number)), peer)  # on both sides at once: NCCL would hang here
        tensor = torch.empty(5)
        for number in range(10):
            free.recv(tensor, peer)
            assert (tensor == number).all()
        ring(free, "ordinary")
        free.barrier()


def test_without_strict_small_sends_return_at_once(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, without_strict, str(tmp_path / "store"))


def receive_for_ever(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    connection.send("running")
    if comm.rank == 2:
        connection.recv()
    comm.recv(torch.empty(10), 2)


def test_a_killed_sender_is_named(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3, receive_for_ever) as ranks:
        for connection in ranks.connections:
            assert connection.recv() == "running"
        ranks.processes[2].kill()
        for rank in (0, 1):
            (kind, message, fields), seconds = ranks.result(rank)
            assert (kind, fields["lost_ranks"]) == ("PeerLostError", [2])
            assert "recv(src=2, tag=0, float32[10])" in message
            assert seconds < 20


def receive_from_any_until_alone(comm: Communicator, connection: Any) -> str:
    comm.barrier()
    if comm.rank == 1:
        comm.close()  # leaves; another may still send
        return ""
    if comm.rank == 2:
        connection.recv()
        comm.send(torch.ones(10), 0)
        comm.close()
        return ""
    tensor = torch.empty(10)
    work = comm.recv(tensor, async_op=True)
    with pytest.raises(TimeoutError):
        work.wait(timeout_s=0.3)  # long enough to see that rank 1 has left
    connection.send("waiting")
    work.wait()
    assert work.source == 2
    comm.recv(tensor)  # nobody is left
    return ""


def test_from_any_source_outlives_peers_that_leave(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3, receive_from_any_until_alone) as ranks:
        assert ranks.connections[0].recv() == "waiting"
        ranks.connections[2].send("go")
        (kind, message, _), _ = ranks.result(0)
        assert kind == "PeerLostError"
        assert "exited normally" in message


def send_that_nobody_receives(comm: Communicator, connection: Any) -> str:
    if comm.rank == 1:
        connection.recv()
        return ""
    comm.send(torch.ones(70_001), 1, timeout_s=0.3)
    return ""


def test_a_send_that_nobody_receives_expires(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, send_that_nobody_receives) as ranks:
        (kind, _, fields), seconds = ranks.result(0)
        assert (kind, fields["missing_ranks"]) == ("PeerTimeoutError", [1])
        assert fields["op"] == "send(dst=1, tag=0, float32[70001])"
        assert seconds < 10
