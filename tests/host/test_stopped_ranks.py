"""A rank that is stopped, or stuck in its own code, is named by all that wait for it, through whatever waits for whom.

Only deadlines find such a rank, and the first to expire may wait for a rank that waits itself. In every shape here that
is rank 0, whose timeout is the shortest, and the victim is the last rank. ``missing_ranks`` is the victim wherever it
is in the group of the call, and the processes at the root are the victim's alone.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from pycomm import Communicator
from pycomm.errors import PeerLostError, PeerTimeoutError
from tests.faults import programs
from tests.hosts.helpers import Hosts
from tests.processes import Processes, connect_rank

TIMEOUTS = (3.0, 3.5, 4.0, 4.5)  # by rank
SOON_S = 10.0


# ``layout``: "shm", or a letter a rank, its host.
def start(layout: str, folder: Path, body: Callable[..., Any], *args: Any) -> Processes:
    """Four ranks, each with its own timeout."""
    if layout != "shm":
        return Hosts(layout, body, *args, timeout_s=TIMEOUTS)
    connects = [partial(connect_rank, str(folder / "store"), rank, 4, TIMEOUTS[rank]) for rank in range(4)]
    return Processes(connects, body, *args)


def next_one(comm: Communicator) -> int:
    return comm.rank + 1


def messages(comm: Communicator, victim: int) -> Iterator[None]:
    """Each rank receives from the next one."""
    yield
    comm.recv(torch.empty(3), next_one(comm))


def large_messages(comm: Communicator, victim: int) -> Iterator[None]:
    """Each rank sends to the next one what it takes a receive to send."""
    yield
    comm.send(torch.empty(300_000), next_one(comm))


def asynchronous_messages(comm: Communicator, victim: int) -> Iterator[None]:
    """Two are under way, and the one whose deadline comes first is not the one that is waited for."""
    yield
    other = comm.recv(torch.empty(3), 0, tag=1, async_op=True) if comm.rank != 0 else None
    work = comm.recv(torch.empty(3), next_one(comm), async_op=True)
    assert work is not None
    work.wait()
    assert other is not None


def overlapping_groups(comm: Communicator, victim: int) -> Iterator[None]:
    """A chain of groups of two: who is in the first pair knows nothing of the third."""
    pairs = [comm.split(0 if comm.rank in (first, first + 1) else None) for first in range(comm.world_size - 1)]
    yield
    pair = pairs[comm.rank]
    assert pair is not None
    pair.all_reduce(torch.ones(100))


def group_of_all(comm: Communicator, victim: int) -> Iterator[None]:
    """Some are in a call of all ranks, others in one of a pair with the victim."""
    pair = comm.split(0 if comm.rank >= victim - 1 else None)
    yield
    if pair is None:
        comm.all_reduce(torch.ones(100))
    else:
        pair.broadcast(torch.ones(100), 1)


def births(comm: Communicator, victim: int) -> Iterator[None]:
    """A communicator is being made, of all but rank 0, which waits for one of those that make it."""
    without_first = comm.split(0 if comm.rank != 0 else None)
    yield
    if without_first is None:
        comm.recv(torch.empty(3), 1)
    else:
        without_first.split(0)


def flags(comm: Communicator, victim: int) -> Iterator[None]:
    """Each rank waits for the flag of the next one."""
    flag = comm.flag(comm.empty(1, dtype=torch.int64).zero_())
    comm.barrier()
    yield
    flag.wait(1, rank=next_one(comm))


def no_meeting() -> Communicator:
    raise AssertionError("no layer makes a communicator by init")


def layer(program: programs.Program, comm: Communicator, victim: int) -> Iterator[None]:
    """What the fault campaign runs."""
    turns = program(programs.Job(comm, random.Random(3), Path(), no_meeting))
    next(turns)
    next(turns)
    yield
    for _ in turns:
        pass


SHAPES: dict[str, Callable[[Communicator, int], Iterator[None]]] = {
    "messages": messages,
    "large_messages": large_messages,
    "asynchronous_messages": asynchronous_messages,
    "overlapping_groups": overlapping_groups,
    "group_of_all": group_of_all,
    "births": births,
    "flags": flags,
    "pipeline": partial(layer, programs.pipeline),
    "mesh": partial(layer, programs.mesh),
    "tensor_parallel": partial(layer, programs.tensor_parallel),
}
ONE_HOST = {"flags", "pipeline", "mesh", "tensor_parallel"}


def wait_for_a_victim(comm: Communicator, connection: Connection, shape: str, stays_busy: bool) -> Any:
    """Of a survivor: what it raised, the ranks it names as numbers of the world, the root, and the processes."""
    victim = comm.world_size - 1
    turns = SHAPES[shape](comm, victim)
    next(turns)
    connection.send("running")
    if comm.rank == victim:
        if stays_busy:
            time.sleep(60)
        connection.recv()  # stopped here
        return None
    connection.recv()
    start = time.monotonic()
    with pytest.raises((PeerTimeoutError, PeerLostError)) as caught, comm:
        next(turns, None)
    error = caught.value
    named = error.missing_ranks if isinstance(error, PeerTimeoutError) else error.lost_ranks
    processes, text = error._root
    tokens = comm._backend.tokens
    at_root = [tokens.index(token) for token in processes]
    return type(error).__name__, str(error), error.group, named, at_root, text, time.monotonic() - start


def check(layout: str, shape: str, folder: Path, *, stays_busy: bool) -> list[tuple[Any, ...]]:
    """What rank 0, 1 and 2 raised; all must have the victim at the root."""
    with start(layout, folder, wait_for_a_victim, shape, stays_busy) as job:
        job.expect("running")
        if not stays_busy:
            os.kill(job.pids[3], signal.SIGSTOP)
        for connection in job.connections[:3]:
            connection.send("go")
        found = [job.result(rank)[0] for rank in range(3)]
        os.kill(job.pids[3], signal.SIGKILL)
    for rank, outcome in enumerate(found):
        assert len(outcome) == 7, outcome
        kind, message, group, named, at_root, text, seconds = outcome
        assert at_root == [3], (rank, kind, message, named, at_root, text)
        if group == "world":
            assert named == [3], (rank, kind, message)
        assert seconds < TIMEOUTS[rank] + SOON_S
    return found


def check_all(
    cases: Sequence[tuple[str, str]], folder: Path, *, stays_busy: bool = False
) -> dict[tuple[str, str], list[Any]]:
    """``check`` of every (layout, shape), several at a time: they wait for deadlines most of the time."""

    def run(case: tuple[str, str]) -> list[Any]:
        layout, shape = case
        own = folder / f"{layout}-{shape}"
        own.mkdir()
        try:
            return check(layout, shape, own, stays_busy=stays_busy)
        except BaseException as error:
            error.add_note(f"{shape} on {layout}")
            raise

    with ThreadPoolExecutor(max_workers=4) as at_once:
        return dict(zip(cases, at_once.map(run, cases), strict=True))


def test_a_stopped_rank_is_named_by_all(tmp_path: Path) -> None:
    for case, found in check_all([("shm", shape) for shape in SHAPES], tmp_path).items():
        assert any("stopped" in message for _, message, *_ in found), (case, found)


@pytest.mark.parametrize("layout", ["aabb", "abab", "abcd"])
def test_a_stopped_rank_is_named_between_hosts(tmp_path: Path, layout: str) -> None:
    check_all([(layout, shape) for shape in SHAPES if shape not in ONE_HOST], tmp_path)


def test_a_rank_in_its_own_code_is_named_by_all(tmp_path: Path) -> None:
    check_all([("shm", "messages"), ("aabb", "messages"), ("shm", "overlapping_groups")], tmp_path, stays_busy=True)


def wait_in_a_ring(comm: Communicator, connection: Connection) -> Any:
    """The first three receive from each other, and the last from rank 0."""
    with pytest.raises((PeerTimeoutError, PeerLostError)) as caught:
        comm.recv(torch.empty(3), next_one(comm) % 3 if comm.rank < 3 else 0)
    error = caught.value
    return isinstance(error, PeerTimeoutError), getattr(error, "missing_ranks", None), str(error)


@pytest.mark.parametrize("layout", ["shm", "aabb", "abcd"])
def test_ranks_that_wait_for_each_other_name_a_neighbour(tmp_path: Path, layout: str) -> None:
    with start(layout, tmp_path, wait_in_a_ring) as job:
        expired, missing, message = job.results()[0]
    assert expired, message
    assert missing == [1], message
