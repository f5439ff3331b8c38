"""What hangs or breaks on NCCL ends within seconds on every rank, with the errors of the host transport.

The stand-in tells nobody of a rank that dies and compares nothing, as NCCL on NVLink: all of this is the watchdog's.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pycomm import Communicator
from pycomm.backends.nccl.backend import NcclBackend
from pycomm.backends.nccl.watchdog import Watchdog
from pycomm.errors import MismatchError, PeerLostError, PeerTimeoutError, PycommError
from tests.nccl.helpers import SOON_S, eventually, gpu_of, ranks, ranks_on_hosts, until_it_fails
from tests.pool import TIMEOUT_S


def watchdog_of(comm: Communicator) -> Watchdog:
    backend = comm._backend
    assert isinstance(backend, NcclBackend)
    return backend._watchdog


def reduce_for_ever(comm: Communicator, connection: Any) -> None:
    tensor = torch.ones(10_000)
    for turn in range(1_000_000):
        comm.all_reduce(tensor, "max")
        comm.synchronize()
        if turn == 5:
            connection.send("running")


def test_a_killed_rank_is_named_on_all(standin: Path, tmp_path: Path) -> None:
    with ranks(4, standin, tmp_path, reduce_for_ever, timeout_s=TIMEOUT_S) as group:
        group.expect("running")
        os.kill(group.pids[2], signal.SIGKILL)
        killed_at = time.monotonic()
        for rank in (0, 1, 3):
            (kind, message, fields), _ = group.result(rank)
            assert (kind, fields["lost_ranks"]) == ("PeerLostError", [2]), message
            assert "rank 2 died" in message
            assert time.monotonic() - killed_at < SOON_S


def test_a_killed_rank_is_named_on_all_hosts(standin: Path, tmp_path: Path) -> None:
    """Between hosts the watchdogs meet over gloo."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ranks_on_hosts("aab", store.port, standin, tmp_path, reduce_for_ever) as group:
        group.expect("running")
        os.kill(group.pids[1], signal.SIGKILL)
        for rank in (0, 2):
            (kind, message, fields), _ = group.result(rank)
            assert (kind, fields["lost_ranks"]) == ("PeerLostError", [1]), message


def stopped(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    eventually(lambda: all(num_calls == 1 for num_calls, _ in watchdog_of(comm)._everyone()))
    connection.send("running")
    if comm.rank == 1:
        connection.recv()  # the test stops this process meanwhile
    comm.all_reduce(torch.ones(1000), "max", async_op=True)
    until_it_fails(comm.synchronize)


def test_a_stopped_rank_is_named_at_the_deadline(standin: Path, tmp_path: Path) -> None:
    with ranks(3, standin, tmp_path, stopped, timeout_s=2.0) as group:
        group.expect("running")
        os.kill(group.pids[1], signal.SIGSTOP)
        for rank in (0, 2):
            (kind, message, fields), seconds = group.result(rank)
            assert (kind, fields["missing_ranks"]) == ("PeerTimeoutError", [1]), message
            assert "rank 1 did not come within 2 s (rank 1 has made 1 call(s), the latest barrier())" in message
            assert 1.9 <= seconds < 2 + SOON_S


def close_in_a_handler(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 1:
        with pytest.raises(PeerLostError, match="rank 0 aborted: closed inside barrier") as caught:
            connection.recv()
            comm.barrier()
        assert caught.value.lost_ranks == [0]
        return
    signal.signal(signal.SIGALRM, lambda *_: comm.close())
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(PeerLostError, match="rank 0 aborted: closed inside barrier"):
        comm.barrier()
    with pytest.raises(PycommError, match="'world' is closed"):
        comm.barrier()


def test_close_in_a_handler_ends_the_barrier_that_it_is_inside_of(standin: Path, tmp_path: Path) -> None:
    """It used to wait for the barrier, as long as that lasts."""
    with ranks(2, standin, tmp_path, close_in_a_handler, timeout_s=TIMEOUT_S) as group:
        result, seconds = group.result(0)
        assert result is None, result
        assert seconds < TIMEOUT_S / 2
        group.connections[1].send("go")
        assert group.result(1)[0] is None, group.result(1)


def first_call_without_a_rank(comm: Communicator, connection: Any) -> None:
    """NCCL connects in the first collective, so this hangs on the host and not on the device."""
    if comm.rank == 1:
        connection.recv()
        return
    with pytest.raises(PeerTimeoutError, match="rank 1 did not come within 0.5 s") as caught:
        comm.broadcast(torch.ones(5), timeout_s=0.5)
    assert caught.value.missing_ranks == [1]
    assert (caught.value.seq, caught.value.group) == (1, "world")
    assert caught.value.op.startswith("broadcast(root=0, float32[5])")
    with pytest.raises(PeerTimeoutError, match="cannot be used any more"):
        comm.send(torch.ones(1), 1)


def test_a_rank_that_never_comes(standin: Path, tmp_path: Path) -> None:
    with ranks(2, standin, tmp_path, first_call_without_a_rank, timeout_s=TIMEOUT_S) as group:
        assert group.result(0)[0] is None, group.result(0)
        group.connections[1].send("go")
        group.result(1)


def all_come_and_nothing_moves(comm: Communicator, connection: Any) -> int:
    comm.barrier()
    gpu_of(comm).library.standin_hang(1)
    comm.all_reduce(torch.ones(5), timeout_s=0.5)
    with pytest.raises(PeerTimeoutError, match="all ranks have called it, but NCCL did not finish within 0.5 s"):
        until_it_fails(comm.synchronize)
    return int(gpu_of(comm).library.standin_num_aborts())


def test_a_hang_inside_nccl_is_told_apart(standin: Path, tmp_path: Path) -> None:
    with ranks(2, standin, tmp_path, all_come_and_nothing_moves, timeout_s=TIMEOUT_S) as group:
        assert group.results() == [1, 1]


def receive_what_nobody_sends(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 0:
        comm.recv(torch.empty(3), 1, timeout_s=0.5)
        with pytest.raises(PeerTimeoutError, match="rank 1 did not come within 0.5 s") as caught:
            until_it_fails(comm.synchronize)
        assert caught.value.missing_ranks == [1]
        return
    with pytest.raises(PeerTimeoutError, match="rank 1 did not come") as caught:
        until_it_fails(comm.synchronize)


def test_a_message_expires(standin: Path, tmp_path: Path) -> None:
    with ranks(2, standin, tmp_path, receive_what_nobody_sends, timeout_s=TIMEOUT_S) as group:
        group.results()


def wrong_order(comm: Communicator, connection: Any) -> None:
    """Both send first: on the host the small messages would pass."""
    comm.barrier()
    comm.send(torch.ones(1), 1 - comm.rank)
    comm.recv(torch.ones(1), 1 - comm.rank)
    with pytest.raises(PeerTimeoutError):
        until_it_fails(comm.synchronize)


def test_sends_that_wait_for_each_other_hang_until_the_deadline(standin: Path, tmp_path: Path) -> None:
    with ranks(2, standin, tmp_path, wrong_order, timeout_s=0.7) as group:
        group.results()


def differing_calls(comm: Communicator, connection: Any, kind: str) -> Any:
    for _ in range(3):
        comm.all_reduce(torch.ones(4))
    start = time.monotonic()
    last = comm.rank == comm.world_size - 1
    if kind == "count":
        comm.all_reduce(torch.ones(8 if last else 4))
    elif kind == "operation" and last:
        comm.broadcast(torch.ones(4), root=1)
    elif kind == "operation":
        comm.all_reduce(torch.ones(4), "max")
    elif kind == "dtype":
        comm.reduce(torch.ones(4, dtype=torch.int32 if last else torch.float32), root=0)
    elif kind == "splits":
        rows = [1, 3, 4] if last else [3, 1, 4]
        comm.all_gather(torch.ones(8), torch.ones(rows[comm.rank]), rows)
    with pytest.raises(MismatchError) as caught:
        for _ in range(200 if kind == "dtype" else 0):  # the program goes on for a while
            comm.all_reduce(torch.ones(4), async_op=True)
        until_it_fails(comm.synchronize)
    assert time.monotonic() - start < SOON_S
    with pytest.raises(MismatchError, match="cannot be used any more"):
        comm.barrier()
    eventually(lambda: gpu_of(comm).library.standin_num_aborts() == 1)  # by whichever thread found out
    return sorted(caught.value.calls.items()), str(caught.value)


EXPECTED = {
    "count": ("all_reduce(sum, float32[4])", "all_reduce(sum, float32[8])"),
    "operation": ("all_reduce(max, float32[4])", "broadcast(root=1, float32[4])"),
    "dtype": ("reduce(root=0, sum, float32[4])", "reduce(root=0, sum, int32[4])"),
}


@pytest.mark.parametrize("kind", ["count", "operation", "dtype", "splits"])
def test_a_mismatch_ends_all_ranks_and_says_who_called_what(standin: Path, tmp_path: Path, kind: str) -> None:
    with ranks(3, standin, tmp_path, differing_calls, kind, timeout_s=TIMEOUT_S) as group:
        results = group.results()
    calls, message = results[0]
    assert [found for found, _ in results] == [calls] * 3
    assert "call 4 of group 'world'" in message
    texts = [text for _, text in calls]
    if kind in EXPECTED:
        assert texts == [EXPECTED[kind][0]] * 2 + [EXPECTED[kind][1]]
    else:
        assert texts[0] == texts[1] != texts[2]
        assert "uneven splits" in texts[2]


def differing_messages(comm: Communicator, connection: Any, tag: int, count: int) -> Any:
    comm.barrier()
    if comm.rank == 0:
        comm.send(torch.ones(1), 1)
        comm.send(torch.ones(3), 1, tag=5)
    elif comm.rank == 1:
        comm.recv(torch.ones(1), 0)
        comm.recv(torch.ones(count), 0, tag=tag)
    with pytest.raises(MismatchError) as caught:
        until_it_fails(comm.synchronize)
    return sorted(caught.value.calls.items()), str(caught.value)


@pytest.mark.parametrize(("tag", "count"), [(6, 3), (5, 4)])
def test_messages_that_do_not_fit(standin: Path, tmp_path: Path, tag: int, count: int) -> None:
    with ranks(3, standin, tmp_path, differing_messages, tag, count, timeout_s=TIMEOUT_S) as group:
        for calls, message in group.results():
            assert calls == [
                (0, "send(dst=1, tag=5, float32[3])"),
                (1, f"recv(src=0, tag={tag}, float32[{count}])"),
            ]
            assert "message 2 from rank 0 to rank 1" in message


def abort_one(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 1:
        comm.abort("the loss is not a number")
    else:
        comm.recv(torch.empty(3), 1)
    with pytest.raises(PeerLostError, match="rank 1 aborted: the loss is not a number") as caught:
        until_it_fails(comm.synchronize)
    assert caught.value.lost_ranks == [1]
    with pytest.raises(PeerLostError, match="cannot be used any more"):
        comm.all_reduce(torch.ones(2))
    with pytest.raises(PycommError):
        comm.split(0)


def test_abort_reaches_every_rank_with_its_reason(standin: Path, tmp_path: Path) -> None:
    with ranks(3, standin, tmp_path, abort_one, timeout_s=TIMEOUT_S) as group:
        group.results()


def leave_early(comm: Communicator, connection: Any) -> None:
    tensor = torch.ones(3)
    comm.all_reduce(tensor)
    if comm.rank == 2:
        comm.close()
        connection.recv()
        return
    eventually(lambda: watchdog_of(comm)._gone is not None)
    comm.synchronize()  # leaving is no failure
    assert (tensor == 3).all()
    with pytest.raises(PeerLostError, match="rank 2 exited normally") as caught:
        comm.all_reduce(tensor)
    assert caught.value.lost_ranks == [2]


def test_a_rank_that_leaves_is_told_apart_from_one_that_dies(standin: Path, tmp_path: Path) -> None:
    with ranks(3, standin, tmp_path, leave_early, timeout_s=TIMEOUT_S) as group:
        for rank in (0, 1):
            assert group.result(rank)[0] is None, group.result(rank)
        group.connections[2].send("go")


def device_error(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 0:
        gpu_of(comm).library.standin_inject_error(6)
    with pytest.raises(PycommError, match="remote process exited or there was a network error"):
        until_it_fails(comm.synchronize)


def test_what_nccl_reports_late_surfaces_on_all(standin: Path, tmp_path: Path) -> None:
    with ranks(2, standin, tmp_path, device_error, timeout_s=TIMEOUT_S) as group:
        group.results()


def work_may_run_out(comm: Communicator, connection: Any) -> None:
    comm.barrier()
    if comm.rank == 0:
        tensor = torch.ones(4)
        work = comm.all_reduce(tensor, async_op=True)
        assert work is not None
        with pytest.raises(TimeoutError, match="it goes on") as caught:
            work.wait(timeout_s=0.2)
        assert not isinstance(caught.value, PycommError)
        connection.send("waited")
        work.wait(timeout_s=TIMEOUT_S)
        assert (tensor == 2).all()
        return
    connection.recv()
    comm.all_reduce(torch.ones(4))
    comm.synchronize()


def test_a_wait_may_run_out(standin: Path, tmp_path: Path) -> None:
    with ranks(2, standin, tmp_path, work_may_run_out, timeout_s=TIMEOUT_S) as group:
        assert group.connections[0].recv() == "waited"
        group.connections[1].send("go")
        group.results()


def kernels(comm: Communicator, connection: Any) -> int:
    """A kernel of pycomm's own gives up on rank 0; then all abort words are set, on both."""
    core = comm._backend._core  # type: ignore[attr-defined]
    words = torch.zeros(2, dtype=torch.int32)
    status, spare = torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    core.watch_kernels(words.data_ptr(), status.data_ptr())
    core.watch_kernels(words.data_ptr() + 4, spare.data_ptr())
    core.forget_kernels(words.data_ptr() + 4)
    comm.barrier()
    assert words.tolist() == [0, 0]
    if comm.rank == 0:
        status[1:] = torch.tensor([1, 7, 12, 11])
        status[0] = 1
    with pytest.raises(PeerTimeoutError, match=r"a kernel gave up: rank 1 did not come in time \(block 7, expected 12"):
        until_it_fails(comm.synchronize)
    eventually(lambda: words[0] != 0)
    late = torch.zeros(1, dtype=torch.int32)
    core.watch_kernels(late.data_ptr(), spare.data_ptr())  # stopped from the start
    eventually(lambda: late[0] != 0)
    assert (words.tolist(), late.tolist()) == ([1, 0], [1])
    return 0


def test_kernels_stop_with_the_communicator_and_their_timeouts_are_told(standin: Path, tmp_path: Path) -> None:
    with ranks(2, standin, tmp_path, kernels, timeout_s=TIMEOUT_S) as group:
        group.results()
