"""Flags in symmetric memory: a barrier in two halves, post and wait."""

import os

import pytest
import torch

from pycomm.errors import PeerTimeoutError

NUM_ROUNDS = 300


def flag_of(comm):
    flag = comm.empty(1, dtype=torch.int64)
    flag.zero_()
    comm.barrier()
    return comm.flag(flag)


def exchange_rounds(comm):
    """Every round writes, posts, waits and reads the peers; two alternating buffers need no other barrier."""
    flag = flag_of(comm)
    buffers = [comm.empty(1024, dtype=torch.int64) for _ in range(2)]
    peers = [comm.peers(buffer) for buffer in buffers]
    wrong = 0
    for k in range(1, NUM_ROUNDS + 1):
        buffers[k % 2].fill_(1000 * k + comm.rank)
        flag.post(k)
        flag.wait(k)
        wrong += sum(int((peer != 1000 * k + r).sum()) for r, peer in enumerate(peers[k % 2]))
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_what_was_written_before_a_post_is_read_after_the_wait(pool, world_size):
    assert pool.run(world_size, exchange_rounds) == [0] * world_size


def wait_for_nobody(comm):
    own = comm.split(0)
    flag = flag_of(own)
    flag.post(1)
    flag.wait(1)
    outcome = None
    if own.rank == 0:
        flag.post(2)
        try:
            flag.wait(2, timeout_s=0.2)
        except PeerTimeoutError as error:
            outcome = error.op, error.missing_ranks
        comm.send(torch.ones(1), 1)
    else:  # is there, and does not post; were it blocked in a call, strict=True would find that the two never end
        work = comm.recv(torch.empty(1), 0, async_op=True)
        while not work.done():
            os.sched_yield()
    own.close()
    return outcome


def test_a_rank_that_does_not_post_is_named(pool):
    first, second = pool.run(2, wait_for_nobody)
    assert second is None
    assert first[1] == [1]
    assert first[0] == "wait_posted(2)"


def wait_for_one(comm):
    """A chain: each rank waits for the one before it alone, and the last rank never posts."""
    flag = flag_of(comm)
    if comm.rank:
        flag.wait(1, rank=comm.rank - 1)
    if comm.rank + 1 < comm.world_size:
        flag.post(1)
    try:
        flag.wait(1, rank=comm.world_size)
    except ValueError as error:
        return str(error)
    return None


def test_one_rank_can_be_waited_for_alone(pool):
    assert all("rank is 3" in message for message in pool.run(3, wait_for_one))


def refusal(comm, make_flag):
    with pytest.raises(ValueError) as caught:
        comm.flag(make_flag(comm))
    return str(caught.value)


def ordinary_flag(comm):
    return torch.zeros(1, dtype=torch.int64)


def narrow_flag(comm):
    return comm.empty(2, dtype=torch.int32)[:1]


def two_flags(comm):
    return comm.empty(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make_flag", "message"),
    [
        (ordinary_flag, "flag is not symmetric memory: take one element of comm.empty(..., dtype=torch.int64)"),
        (narrow_flag, "flag is torch.int32 [1]: it must be one torch.int64"),
        (two_flags, "flag is torch.int64 [2]: it must be one torch.int64"),
    ],
)
def test_what_is_no_flag_is_refused(pool, make_flag, message):
    assert pool.run(1, refusal, make_flag) == [message]
