"""Messages inside a host and between hosts: sizes, tags, order, any source, batches, disagreement, lost peers."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import pytest
import torch

from pycomm import Communicator
from pycomm.errors import MismatchError, PeerLostError, PeerTimeoutError
from tests.hosts.helpers import Hosts

COUNTS = (0, 1, 500, 70_001)  # float32: with the offer, and apart from it
SOON_S = 5.0


def values(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def random_exchanges(comm: Communicator, _: Any, seed: int, num_rounds: int) -> None:
    """All ranks draw the same program: each round a set of messages, as one batch or as asynchronous calls, between
    collectives that do not care."""
    draw = random.Random(seed)
    for round_number in range(num_rounds):
        works: list[Any] = []
        received = []
        as_batch = draw.random() < 0.5
        batch = comm.batch()
        total = torch.ones(3)
        works.append(comm.all_reduce(total, async_op=True))
        for number in range(draw.randrange(1, 9)):
            source, destination = draw.randrange(comm.world_size), draw.randrange(comm.world_size)
            count, tag = draw.choice(COUNTS), draw.choice([number, -number])
            expected = values(count, 9 * round_number + number)
            calls: Any = batch if as_batch else comm
            options = {} if as_batch else {"async_op": True}
            if comm.rank == source:
                works.append(calls.send(expected.clone(), destination, tag, **options))
            if comm.rank == destination:
                into = torch.zeros(count)
                works.append(calls.recv(into, source, tag, **options))
                received.append((into, expected))
        with batch:
            pass
        for work in works:
            if work is not None:
                work.wait()
        for into, expected in received:
            assert torch.equal(into, expected), (seed, round_number)
        assert (total == comm.world_size).all()


@pytest.mark.parametrize(("layout", "backend"), [("aabb", "auto"), ("aba", "auto"), ("aaa", "gloo")])
@pytest.mark.parametrize("strict", [False, True])
def test_random_exchanges(layout: str, backend: str, strict: bool) -> None:
    with Hosts(layout, random_exchanges, 17, 25, backend=backend, strict=strict) as hosts:
        hosts.results()


def order_and_tags(comm: Communicator, _: Any) -> None:
    """Of one tag first in, first out, whatever the sizes; of many tags in any order; every dtype and shape."""
    counts = [70_001, 3, 70_001, 3, 3] * 3
    if comm.rank == 0:
        works = [comm.send(torch.full((n,), float(i)), 2, async_op=True) for i, n in enumerate(counts)]
        works += [comm.send(values(n, tag), 2, tag, async_op=True) for tag, n in enumerate(counts, 1)]
        for work in works:
            work.wait()
    elif comm.rank == 2:
        for tag in range(len(counts), 0, -1):
            tensor = torch.empty(counts[tag - 1])
            assert comm.recv(tensor, 0, tag) == 0
            assert torch.equal(tensor, values(tensor.numel(), tag))
        for number, count in enumerate(counts):
            tensor = torch.empty(count)
            comm.recv(tensor, 0)
            assert (tensor == number).all()
    for dtype in (torch.bool, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64):
        mine = torch.arange(6).reshape(2, 3).to(dtype)
        theirs = torch.zeros(2, 3, dtype=dtype)
        with comm.batch() as batch:
            batch.send(mine, (comm.rank + 1) % 3)
            batch.recv(theirs, (comm.rank + 2) % 3)
        assert torch.equal(mine, theirs)
        assert batch.sources == [(comm.rank + 1) % 3, (comm.rank + 2) % 3]


@pytest.mark.parametrize(("layout", "backend"), [("aab", "auto"), ("aaa", "gloo")])
def test_order_and_tags(layout: str, backend: str) -> None:
    with Hosts(layout, order_and_tags, backend=backend) as hosts:
        hosts.results()


def from_any_source(comm: Communicator, _: Any) -> list[int]:
    """From this host and from another one; large ones, too; and a receive that nobody waits for meanwhile."""
    sources = []
    for count in (3, 70_001):
        if comm.rank == 0:
            for _turn in range(1, comm.world_size):
                tensor = torch.empty(count)
                source = comm.recv(tensor)
                assert isinstance(source, int)
                assert torch.equal(tensor, values(count, source))
                sources.append(source)
        else:
            comm.send(values(count, comm.rank), 0)
        comm.barrier()
        tensor = torch.empty(count)
        for sender in range(1, comm.world_size):
            work = comm.recv(tensor, tag=5, async_op=True) if comm.rank == 0 else None
            if comm.rank == sender:
                comm.send(values(count, sender), 0, tag=5)  # large: returns once the receive has matched
            comm.barrier()
            if work is not None:
                work.wait()
                assert (work.source, torch.equal(tensor, values(count, sender))) == (sender, True)
            comm.barrier()  # else the next rank's message may come first
    return sources


@pytest.mark.parametrize(("layout", "backend"), [("aabb", "auto"), ("aaa", "gloo")])
def test_from_any_source(layout: str, backend: str) -> None:
    with Hosts(layout, from_any_source, backend=backend) as hosts:
        others = list(range(1, len(layout)))
        assert sorted(hosts.results()[0]) == sorted(2 * others)


def disagreement(comm: Communicator, _: Any) -> dict[int, str]:
    """Ranks 1 and 3 share a host, ranks 0 and 2 the other one: messages inside and between hosts."""
    calls = {}
    for peer in ((comm.rank + 1) % 4, (comm.rank + 2) % 4):
        pair = sorted((comm.rank, peer))
        if peer == (comm.rank + 1) % 4 and pair not in ([0, 1], [2, 3]):
            peer = (comm.rank - 1) % 4
            pair = sorted((comm.rank, peer))
        tensor = torch.full((70_001 + (comm.rank == pair[1]),), -1.0)
        with pytest.raises(MismatchError) as caught:
            if comm.rank == pair[0]:
                comm.send(tensor, peer, tag=2)
            else:
                comm.recv(tensor, peer, tag=2)
        assert (tensor == -1.0).all()
        calls.update({peer: str(sorted(caught.value.calls.items()))})
    comm.barrier()  # and the communicator goes on
    return calls


def test_sides_that_disagree_are_both_told() -> None:
    with Hosts("abab", disagreement) as hosts:
        for rank, calls in enumerate(hosts.results()):
            for peer, text in calls.items():
                low, high = sorted((rank, peer))
                expected = {
                    low: f"send(dst={high}, tag=2, float32[70001])",
                    high: f"recv(src={low}, tag=2, float32[70002])",
                }
                assert text == str(sorted(expected.items()))


def receive_for_ever(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    connection.send("running")
    if comm.rank == 3:
        connection.recv()
    if comm.rank == 0:
        comm.send(torch.ones(70_001), 3)
    comm.recv(torch.empty(10), 3)


def test_a_killed_sender_is_named_inside_and_outside_its_host() -> None:
    with Hosts("aabb", receive_for_ever) as hosts:
        hosts.expect("running")
        os.kill(hosts.pids[3], signal.SIGKILL)
        killed_at = time.monotonic()
        for rank in range(3):
            (kind, message, fields), _ = hosts.result(rank)
            assert (kind, fields["lost_ranks"]) == ("PeerLostError", [3]), message
            assert time.monotonic() - killed_at < SOON_S


def expire(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 1:
        connection.recv()
        return
    with pytest.raises(PeerTimeoutError, match="rank 1 did not answer") as caught:
        comm.recv(torch.empty(3), 1, timeout_s=0.5)
    assert caught.value.missing_ranks == [1]
    assert caught.value.op == "recv(src=1, tag=0, float32[3])"
    with pytest.raises(PeerTimeoutError, match="cannot be used any more"):
        comm.send(torch.ones(1), 1)


def test_a_message_expires() -> None:
    with Hosts("ab", expire) as hosts:
        assert hosts.result(0)[0] is None, hosts.result(0)
        hosts.connections[1].send("go")


def leave(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 1:
        comm.send(torch.ones(3), 0, tag=1)
        comm.send(torch.ones(70_001), 0, tag=2)
        comm.close()
        return
    comm.recv(torch.empty(70_001), 1, tag=2)
    comm.recv(torch.empty(3), 1, tag=1)  # it came before the other left
    with pytest.raises(PeerLostError, match="rank 1 exited normally") as caught:
        comm.recv(torch.empty(3), 1)
    assert caught.value.lost_ranks == [1]


def test_what_a_rank_sent_before_it_left_counts() -> None:
    with Hosts("ab", leave) as hosts:
        hosts.results()
