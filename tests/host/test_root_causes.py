"""``lost_ranks`` names the ranks at the root of a failure, in whatever group and by whatever way to leave it came."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from pycomm import Communicator
from pycomm.errors import PeerLostError, PeerTimeoutError, PycommError
from tests.hosts.helpers import Hosts
from tests.pool import Pool
from tests.processes import Processes, Ranks

# Everywhere rank 2 is at the root; rank 1, in a group with it, learns of that and leaves; rank 0, which waits for rank
# 1 in the group of all, must name rank 2.
ROOT, MESSENGER, WAITER = 2, 1, 0
LAYOUTS = ("shm", "abc", "aab", "abb")  # a letter a rank: its host


def start(layout: str, folder: Path, body: Callable[..., Any], *args: Any) -> Processes:
    return Ranks(folder, 3, Bound(body, *args)) if layout == "shm" else Hosts(layout, body, *args)


class Bound:
    """A picklable ``body(comm, connection, *args)``."""

    def __init__(self, body: Callable[..., Any], *args: Any) -> None:
        self.body, self.args = body, args

    def __call__(self, comm: Communicator, connection: Connection) -> Any:
        return self.body(comm, connection, *self.args)


def groups_of(comm: Communicator) -> tuple[Communicator, Communicator]:
    """A group of all, and one of the root and the messenger, or of the waiter alone."""
    everyone = comm.split(0)
    assert everyone is not None
    pair = everyone.split(int(comm.rank != WAITER))
    assert pair is not None
    return everyone, pair


def fail_with_root(pair: Communicator, way: str) -> None:
    if way == "timeout":
        with pytest.raises(PeerTimeoutError) as expired:
            pair.barrier(timeout_s=0.3)
        assert expired.value.missing_ranks == [1]
        raise expired.value
    with pytest.raises(PeerLostError, match="on purpose") as lost:
        pair.barrier()
    assert lost.value.lost_ranks == [1]
    raise lost.value


def leave(everyone: Communicator, pair: Communicator, way: str) -> None:
    if way == "abort":
        with contextlib.suppress(PycommError):
            fail_with_root(pair, way)
        everyone.abort("my step failed")
    elif way == "close":
        with contextlib.suppress(PycommError):
            fail_with_root(pair, way)
        everyone.close()
    else:
        with contextlib.suppress(PycommError), everyone:
            fail_with_root(pair, way)


def pass_on(comm: Communicator, connection: Connection) -> list[tuple[str, list[int], str]]:
    """Once for each way in which the messenger leaves."""
    found = []
    for way in ("context", "abort", "close", "timeout"):
        everyone, pair = groups_of(comm)
        if comm.rank == ROOT:
            if way != "timeout":
                pair.abort("on purpose")
        elif comm.rank == MESSENGER:
            leave(everyone, pair, way)
        else:
            with pytest.raises(PeerLostError) as lost:
                everyone.recv(torch.empty(3), MESSENGER)
            found.append((way, lost.value.lost_ranks, str(lost.value)))
        comm.barrier()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_root_is_named_however_the_messenger_leaves(tmp_path: Path, layout: str) -> None:
    with start(layout, tmp_path, pass_on) as ranks:
        for way, lost, text in ranks.results()[WAITER]:
            assert lost == [ROOT], (way, text)
            assert ("0.3 s" if way == "timeout" else "on purpose") in text, (way, text)


def outside_and_on(comm: Communicator, connection: Connection) -> list[tuple[list[int], str]]:
    """The root is not in the group where it surfaces. The second time the messenger goes on first: its own end."""
    found = []
    for goes_on in (False, True):
        _, pair = groups_of(comm)
        without_root = comm.split(int(comm.rank == ROOT))
        assert without_root is not None
        if comm.rank == ROOT:
            pair.abort("on purpose")
        elif comm.rank == MESSENGER:
            with contextlib.suppress(PycommError):
                fail_with_root(pair, "")
            if goes_on:
                without_root.send(torch.ones(3), WAITER)
            without_root.close()
        else:
            if goes_on:
                without_root.recv(torch.empty(3), MESSENGER)
            with pytest.raises(PeerLostError) as lost:
                without_root.recv(torch.empty(3), MESSENGER)
            found.append((lost.value.lost_ranks, str(lost.value)))
        comm.barrier()
    return found


@pytest.mark.parametrize("layout", ["shm", "aab"])
def test_a_root_outside_of_the_group_is_named_in_words(tmp_path: Path, layout: str) -> None:
    with start(layout, tmp_path, outside_and_on) as ranks:
        (lost, text), (lost_later, text_later) = ranks.results()[WAITER]
    assert lost == [MESSENGER]
    assert "rank 1 aborted: on purpose" in text
    assert ".0[1]" in text  # the group whose rank 1 that is
    assert lost_later == [MESSENGER]
    assert "exited normally" in text_later
    assert "on purpose" not in text_later


def die_of_a_killed_rank(comm: Communicator, connection: Connection) -> Any:
    everyone, pair = groups_of(comm)
    connection.send("running")
    if comm.rank == ROOT:
        connection.recv()  # killed here
    elif comm.rank == MESSENGER:
        try:
            pair.barrier()
        except PeerLostError:
            os._exit(1)  # closes nothing
    else:
        everyone.recv(torch.empty(3), MESSENGER)
    return None


@pytest.mark.parametrize("layout", ["shm", "aab"])
def test_a_rank_that_dies_of_a_killed_one_does_not_take_its_place(tmp_path: Path, layout: str) -> None:
    with start(layout, tmp_path, die_of_a_killed_rank) as ranks:
        ranks.expect("running")
        os.kill(ranks.pids[ROOT], signal.SIGKILL)
        (kind, message, fields), _ = ranks.result(WAITER)
        assert (kind, fields["lost_ranks"]) == ("PeerLostError", [ROOT]), message


def blocked(comm: Communicator, connection: Connection) -> list[str]:
    """Rank 0 waits for rank 1, which is in something else."""
    found = []

    def wait_for_a_flag(group: Communicator) -> None:
        cell = group.empty(1, dtype=torch.int64).zero_()
        group.barrier()
        flag = group.flag(cell)
        if comm.rank == 1:
            flag.wait(1, timeout_s=1.5)

    def receive(group: Communicator) -> None:
        if comm.rank == 1:
            group.recv(torch.empty(3), 0, tag=7, timeout_s=1.5)

    def train(group: Communicator) -> None:
        if comm.rank == 1:
            with group.busy("training the tokenizer"):
                connection.recv()  # once rank 0 has expired

    for act in (receive, wait_for_a_flag, train):
        group, other = comm.split(0), comm.split(0)
        assert group is not None
        assert other is not None
        with contextlib.suppress(PeerTimeoutError):
            act(group)
        if comm.rank == 0:
            with pytest.raises(PeerTimeoutError) as expired:
                other.barrier(timeout_s=0.4)
            found.append(str(expired.value))
            if act is train:
                connection.send("expired")
        comm.barrier()
    return found


def test_a_blocked_rank_is_not_said_to_have_called_nothing(tmp_path: Path) -> None:
    """It used to be "has called nothing yet", since only collectives were shown."""
    with Ranks(tmp_path, 2, blocked) as ranks:
        assert ranks.connections[0].recv() == "expired"
        ranks.connections[1].send("go")
        receive, flag, train = ranks.results()[0]
    assert "rank 1 is in recv(src=0, tag=7, float32[3]) #1 of group 'world." in receive
    assert "rank 1 is in wait_posted(1)" in flag
    assert "rank 1 is in training the tokenizer" in train


def abort_in_any_language(comm: Communicator) -> None:
    for reason in ("é" * 447, "x" + "é" * 447, "xx" + "日本" * 200, "a name \udcff.txt", "🙂" * 200):
        group = comm.split(0)
        assert group is not None
        if comm.rank == 0:
            group.abort(reason)
        else:
            with pytest.raises(PeerLostError, match="rank 0 aborted: ") as lost:
                group.barrier()
            assert "\ufffd" not in str(lost.value)
        comm.barrier()


def test_a_long_reason_is_cut_between_two_characters(pool: Pool) -> None:
    """Cut inside one, it raised UnicodeDecodeError in place of PeerLostError."""
    pool.run(2, abort_in_any_language)
