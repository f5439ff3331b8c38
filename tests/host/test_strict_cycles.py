"""strict=True: calls that wait for each other raise on every rank of the cycle, which they name; slow ones do not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pycomm
from pycomm import Communicator
from pycomm.errors import StrictOrderError
from tests.pool import TIMEOUT_S, Pool, file_store

LONGER_THAN_IT_TAKES_S = 0.7  # a wait is looked at after 50 ms and twice more; so long a wait would have been judged
SMALL, LARGE = 10, 300_001


def in_strict_group(comm: Communicator, path: str, name: str, *args: Any) -> Any:
    """Run the body of that name below on a communicator of its own, since a cycle makes it unusable."""
    body: Callable[..., Any] = globals()[name]
    store = file_store(path, comm.world_size)
    with pycomm.init(
        store=store, rank=comm.rank, world_size=comm.world_size, strict=True, timeout_s=TIMEOUT_S
    ) as strict:
        try:
            result = body(strict, *args)
        except StrictOrderError as error:
            with pytest.raises(StrictOrderError, match="cannot be used any more"):
                strict.barrier()
            return str(error)
        strict.barrier()
        return result


def outcomes(pool: Pool, folder: Path, world_size: int, name: str, *args: Any) -> list[Any]:
    return pool.run(world_size, in_strict_group, str(folder / "store"), name, *args)


def cycle_in(messages: list[Any]) -> str:
    """Which all ranks tell alike."""
    assert all(isinstance(message, str) for message in messages), messages
    (cycle,) = {message.partition("NCCL: ")[2].partition(". Let")[0] for message in messages}
    return cycle


def ring_of_sends(comm: Communicator, count: int, symmetric: bool) -> None:
    tensor = comm.empty(count) if symmetric else torch.empty(count)
    comm.send(tensor, (comm.rank + 1) % comm.world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "symmetric"), [(SMALL, False), (LARGE, False), (LARGE, True)])
def test_a_ring_of_sends(pool: Pool, tmp_path: Path, world_size: int, count: int, symmetric: bool) -> None:
    cycle = cycle_in(outcomes(pool, tmp_path, world_size, "ring_of_sends", count, symmetric))
    ranks = [
        f"rank {r} in send(dst={(r + 1) % world_size}, tag=0, float32[{count}]) #1 of group 'world'"
        for r in range(world_size)
    ]
    assert cycle == " -> ".join([*ranks, "rank 0"])


def all_receive(comm: Communicator, any_source: bool) -> None:
    comm.recv(torch.empty(SMALL), None if any_source else (comm.rank + 1) % comm.world_size)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("any_source", [False, True])
def test_all_receive(pool: Pool, tmp_path: Path, world_size: int, any_source: bool) -> None:
    cycle = cycle_in(outcomes(pool, tmp_path, world_size, "all_receive", any_source))
    assert cycle.count("in recv(") >= 2


def other_tag(comm: Communicator) -> None:
    if comm.rank == 0:
        comm.send(torch.empty(SMALL), 1, tag=1)
    else:
        comm.recv(torch.empty(SMALL), 0, tag=2)


def test_a_message_of_another_tag(pool: Pool, tmp_path: Path) -> None:
    cycle = cycle_in(outcomes(pool, tmp_path, 2, "other_tag"))
    assert "send(dst=1, tag=1" in cycle
    assert "recv(src=0, tag=2" in cycle


def batch_and_send(comm: Communicator) -> None:
    """Rank 0's first message is received; its second waits for rank 1, which waits for its own."""
    peer = 1 - comm.rank
    if comm.rank == 0:
        with comm.batch() as batch:
            batch.send(torch.empty(SMALL), peer)
            batch.recv(torch.empty(SMALL), peer, tag=1)
    else:
        comm.recv(torch.empty(SMALL), peer)
        comm.recv(torch.empty(SMALL), peer, tag=1)


def test_a_batch_that_is_half_done(pool: Pool, tmp_path: Path) -> None:
    assert "recv(src=0, tag=1" in cycle_in(outcomes(pool, tmp_path, 2, "batch_and_send"))


def send_to_oneself(comm: Communicator) -> None:
    if comm.rank == 1:
        comm.send(torch.empty(SMALL), 1)
    comm.barrier()


def test_a_send_to_oneself_outside_a_batch(pool: Pool, tmp_path: Path) -> None:
    """The other ranks wait for the one that waits for itself."""
    cycle = cycle_in(outcomes(pool, tmp_path, 3, "send_to_oneself"))
    assert cycle == "rank 1 in send(dst=1, tag=0, float32[10]) #1 of group 'world' -> rank 1"


def collective_and_message(comm: Communicator, count: int, symmetric: bool) -> None:
    tensor = comm.empty(count) if symmetric else torch.empty(count)
    if comm.rank == 1:
        comm.recv(torch.empty(SMALL), 0)
    comm.all_reduce(tensor)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("count", "symmetric"), [(SMALL, False), (LARGE, True)])
def test_a_collective_and_a_message(pool: Pool, tmp_path: Path, world_size: int, count: int, symmetric: bool) -> None:
    cycle = cycle_in(outcomes(pool, tmp_path, world_size, "collective_and_message", count, symmetric))
    seq = 4 if symmetric else 1  # an allocation is three exchanges
    assert cycle == (
        f"rank 0 in all_reduce(sum, float32[{count}]) #{seq} of group 'world' -> "
        "rank 1 in recv(src=0, tag=0, float32[10]) #1 of group 'world' -> rank 0"
    )


def crossed_collectives(comm: Communicator) -> str:
    """Only the groups of the calls are of no use afterwards."""
    first, second = comm.split(0), comm.split(0)
    assert first is not None
    assert second is not None
    groups = (first, second) if comm.rank == 0 else (second, first)
    with pytest.raises(StrictOrderError) as caught:
        for group in groups:
            group.all_reduce(torch.ones(SMALL))
    return str(caught.value)


def test_crossed_collectives_of_two_groups(pool: Pool, tmp_path: Path) -> None:
    cycle = cycle_in(outcomes(pool, tmp_path, 2, "crossed_collectives"))
    assert "'world.0[0]'" in cycle
    assert "'world.1[0]'" in cycle


def test_a_cycle_through_several_groups(pool: Pool, tmp_path: Path) -> None:
    cycle = cycle_in(outcomes(pool, tmp_path, 3, "ring_over_pairs"))
    for number in range(3):
        assert f"'world.{number}[0]'" in cycle


def ring_over_pairs(comm: Communicator) -> str:
    """Each pair of neighbours has its own communicator; each rank sends on the one with its right neighbour."""
    n = comm.world_size
    pairs = [comm.split(0 if comm.rank in (left, (left + 1) % n) else None) for left in range(n)]
    mine = pairs[comm.rank]
    assert mine is not None
    with pytest.raises(StrictOrderError) as caught:
        mine.send(torch.empty(SMALL), 1 - mine.rank)
    return str(caught.value)


def slow_end_of_a_chain(comm: Communicator) -> None:
    """Everyone waits for its right neighbour, but the last is only slow."""
    tensor = torch.ones(SMALL)
    if comm.rank == comm.world_size - 1:
        time.sleep(LONGER_THAN_IT_TAKES_S)
    else:
        comm.recv(tensor, comm.rank + 1)
    if comm.rank > 0:
        comm.send(tensor, comm.rank - 1)
    comm.all_reduce(tensor)


def slow_third(comm: Communicator) -> None:
    """Ranks 0 and 1 exchange with rank 2 from any source; a collective waits for all of them."""
    if comm.rank == 2:
        time.sleep(LONGER_THAN_IT_TAKES_S)
        comm.send(torch.ones(SMALL), 0)
        comm.send(torch.ones(SMALL), 1)
    elif comm.rank < 2:
        comm.recv(torch.empty(SMALL))
    comm.barrier()


def asynchronous_other_half(comm: Communicator) -> None:
    """Blocking sends both ways, of which a receive is under way already: the host goes on."""
    peer = comm.rank ^ 1
    tensor = torch.empty(20 * LARGE)
    for _ in range(5):
        work = comm.recv(tensor, peer, async_op=True)
        comm.send(torch.ones(20 * LARGE), peer)
        assert not isinstance(work, int)
        work.wait()
        assert (tensor == 1).all()


def long_copies(comm: Communicator) -> None:
    """Rank 0's batch still needs a message of rank 1, which needs rank 0 to finish copying."""
    large = comm.empty(40_000_000)
    large.fill_(1.0)
    if comm.rank == 0:
        with comm.batch() as batch:
            batch.recv(torch.empty_like(large), 1)
            batch.recv(torch.empty(SMALL), 1, tag=1)
    elif comm.rank == 1:
        comm.send(large, 0)
        comm.send(torch.ones(SMALL), 0, tag=1)


def another_thread_helps(comm: Communicator) -> None:
    """Both ranks' main threads receive; a second thread of each, known for its barrier, sends later."""
    peer = 1 - comm.rank

    def send_later() -> None:
        comm.barrier()
        time.sleep(LONGER_THAN_IT_TAKES_S)
        comm.send(torch.ones(SMALL), peer)

    thread = threading.Thread(target=send_later)
    comm.barrier()
    thread.start()
    comm.recv(torch.empty(SMALL), peer)
    thread.join()


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("slow_end_of_a_chain", 2),
        ("slow_end_of_a_chain", 4),
        ("slow_third", 3),
        ("asynchronous_other_half", 2),
        ("asynchronous_other_half", 4),
        ("long_copies", 2),
        ("another_thread_helps", 2),
    ],
)
def test_slow_is_no_cycle(pool: Pool, tmp_path: Path, name: str, world_size: int) -> None:
    assert outcomes(pool, tmp_path, world_size, name) == [None] * world_size
