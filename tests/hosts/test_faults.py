"""A rank of another host that dies, stops, leaves or aborts is named on every survivor, in time."""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pycomm import Communicator
from pycomm.errors import PeerLostError, PeerTimeoutError, PycommError
from tests.hosts.helpers import Hosts

SOON_S = 5.0  # generous: the ranks share two cores, and each hand-off of gloo is a thread of its own
GRACE_S = 4.0  # after a deadline, docs/several_hosts.md


def reduce_for_ever(comm: Communicator, connection: Any) -> None:
    symmetric = comm.empty(200_000)
    tensor = symmetric if comm.rank % 2 else torch.ones(200_000)
    tensor.fill_(1.0)
    for turn in range(1_000_000):
        comm.all_reduce(tensor, "avg")
        if turn == 5:
            connection.send("running")


@pytest.mark.parametrize("victim", [0, 2, 3])
def test_a_killed_rank_is_named_on_both_hosts(victim: int) -> None:
    with Hosts("aabb", reduce_for_ever) as hosts:
        hosts.expect("running")
        os.kill(hosts.pids[victim], signal.SIGKILL)
        killed_at = time.monotonic()
        for rank in {0, 1, 2, 3} - {victim}:
            (kind, message, fields), _ = hosts.result(rank)
            assert (kind, fields["lost_ranks"]) == ("PeerLostError", [victim]), message
            assert f"rank {victim} died" in message
            assert time.monotonic() - killed_at < SOON_S


def split_with_a_victim(comm: Communicator, connection: Any, victim: int) -> None:
    comm.barrier()
    if comm.rank == victim:
        with patch("pycomm.backends.gloo.backend.Wire", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
            comm.split(0)
    comm.split(0)


def test_a_rank_that_dies_inside_split_is_named_at_once() -> None:
    """Each rank is alone on its host: only closed connections tell."""
    with Hosts("abc", split_with_a_victim, 1) as hosts:
        for rank in (0, 2):
            (kind, message, fields), seconds = hosts.result(rank)
            assert (kind, fields.get("lost_ranks")) == ("PeerLostError", [1]), message
            assert seconds < 2 * SOON_S  # gloo's deadline is TIMEOUT_S


def all_reduce_with_one_stopped(comm: Communicator, connection: Any, victim: int) -> None:
    comm.barrier()
    connection.send("running")
    if comm.rank == victim:
        connection.recv()  # the test stops this process meanwhile
    comm.all_reduce(torch.ones(1000), "max")


@pytest.mark.parametrize("victim", [0, 3])
def test_a_stopped_rank_is_named_at_the_deadline(victim: int) -> None:
    timeout_s = 2.0
    with Hosts("aabb", all_reduce_with_one_stopped, victim, timeout_s=timeout_s) as hosts:
        hosts.expect("running")
        os.kill(hosts.pids[victim], signal.SIGSTOP)
        for rank in {0, 1, 2, 3} - {victim}:
            (kind, message, fields), seconds = hosts.result(rank)
            assert (kind, fields["missing_ranks"]) == ("PeerTimeoutError", [victim]), message
            assert (fields["seq"], fields["group"]) == (2, "world")
            assert "all_reduce(max, float32[1000])" in fields["op"]
            assert timeout_s <= seconds < timeout_s + GRACE_S


def leave_early(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 3:
        comm.close()
        return
    comm.all_reduce(torch.ones(10))


def test_a_rank_that_leaves_is_told_apart_from_one_that_dies() -> None:
    with Hosts("aabb", leave_early) as hosts:
        for rank in range(3):
            (kind, message, fields), seconds = hosts.result(rank)
            assert (kind, fields["lost_ranks"]) == ("PeerLostError", [3]), message
            assert "exited normally" in message
            assert seconds < SOON_S


def abort_while_others_wait(comm: Communicator, connection: Any) -> list[str]:
    if comm.rank == 1:  # at once: an abort ends what is under way, too
        comm.abort("the loss is not a number")
    messages = []
    for _ in range(2):
        with pytest.raises(PeerLostError, match="rank 1 aborted: the loss is not a number") as caught:
            comm.barrier()
        assert caught.value.lost_ranks == [1]
        messages.append(str(caught.value))
    assert "cannot be used any more" in messages[1]
    queued = comm.all_reduce(torch.ones(2), async_op=True)
    assert queued is not None
    with pytest.raises(PycommError):
        queued.wait()
    with pytest.raises(PeerLostError, match="not a number"):
        comm.send(torch.ones(2), (comm.rank + 2) % 4)
    return messages


def test_abort_reaches_every_rank_with_its_reason() -> None:
    with Hosts("aabb", abort_while_others_wait) as hosts:
        hosts.results()


def work_may_run_out(comm: Communicator, connection: Any) -> None:
    if comm.rank == 0:
        work = comm.all_reduce(torch.ones(4), async_op=True)
        assert work is not None
        with pytest.raises(TimeoutError, match="it goes on") as caught:
            work.wait(timeout_s=0.2)
        assert not isinstance(caught.value, PycommError)
        connection.send("waited")
        work.wait()
        with pytest.raises(PeerTimeoutError):
            comm.barrier(timeout_s=0.3)
        comm.close()
        comm.close()
        return
    connection.recv()
    comm.all_reduce(torch.ones(4))
    with pytest.raises((PeerLostError, PeerTimeoutError)):
        connection.recv()
        comm.barrier()


def test_a_wait_may_run_out_and_a_call_with_its_own_deadline_expires() -> None:
    with Hosts("ab", work_may_run_out) as hosts:
        assert hosts.connections[0].recv() == "waited"
        hosts.connections[1].send("go")
        result, _ = hosts.result(0)
        assert result is None
        hosts.connections[1].send("go")
        result, _ = hosts.result(1)
        assert result is None


def interrupted(comm: Communicator, connection: Any) -> str:
    if comm.rank == 1:
        comm.barrier()  # until the other gives up
        return "returned"
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        comm.recv(torch.empty(3), 1)
    except KeyboardInterrupt:
        return "interrupted"
    return "returned"


def test_ctrl_c_ends_a_wait_and_tells_the_others() -> None:
    with Hosts("ab", interrupted) as hosts:
        assert hosts.result(0)[0] == "interrupted"
        (kind, message, _), seconds = hosts.result(1)
        assert kind == "PeerLostError"
        assert "interrupted" in message
        assert seconds < SOON_S


def use_after_fork(comm: Communicator, connection: Any) -> None:
    child = os.fork()
    if child == 0:
        try:
            comm.barrier()
        except PycommError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    comm.barrier()


def test_a_forked_child_is_no_rank() -> None:
    with Hosts("ab", use_after_fork) as hosts:
        hosts.results()
