"""What happens when ranks die, stop, leave, abort, fork or disagree. Each test starts its own processes."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from pycomm import Communicator
from pycomm.errors import MismatchError, PeerLostError, PeerTimeoutError, PycommError
from tests.pool import Pool
from tests.processes import Ranks, is_left_behind, names_held_by

SOON_S = 2.0  # a dead peer is seen within this time (docs/errors.md)


def reduce_until_lost(comm: Communicator, connection: Connection) -> float:
    """All-reduce without end; tells the test when it is in the middle of them."""
    symmetric = comm.empty(1_000_000)
    tensor = torch.empty(1_000_000) if comm.rank == 1 else symmetric
    tensor.fill_(1.0)
    for turn in range(100_000_000):
        comm.all_reduce(tensor, "avg")
        if turn == 20:
            connection.send("running")
    return 0.0


def reduce_with_a_data_loader(comm: Communicator, connection: Connection) -> float:
    # "fork" is what a script gets by default on Linux: the worker inherits this rank's sockets and mappings.
    loader = DataLoader(range(100_000), batch_size=2, num_workers=1, multiprocessing_context="fork")  # type: ignore[arg-type]
    batches = iter(loader)
    next(batches)
    return reduce_until_lost(comm, connection)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("body", [reduce_until_lost, reduce_with_a_data_loader])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_on_every_survivor(tmp_path: Path, body: Callable[..., Any], victim: int) -> None:
    with Ranks(tmp_path, 3, body) as ranks:
        for connection in ranks.connections:
            assert connection.recv() == "running"
        workers = [os.pidfd_open(pid) for pid in children(ranks.pids[victim])]
        assert len(workers) == (1 if body is reduce_with_a_data_loader else 0)
        names = set().union(*(names_held_by(pid) for rank in ranks.pids for pid in (rank, *children(rank))))
        killed_at = time.monotonic()
        os.kill(ranks.pids[victim], signal.SIGKILL)
        for rank in {0, 1, 2} - {victim}:
            (kind, message, fields), _ = ranks.result(rank)
            assert time.monotonic() - killed_at < SOON_S
            assert kind == "PeerLostError"
            assert fields["lost_ranks"] == [victim]
            assert f"rank {victim}" in message
        for worker in workers:  # its own watchdog looks for its parent every five seconds
            assert select.select([worker], [], [], 30)[0]
            os.close(worker)
    assert not [name for name in names if is_left_behind(name)]


def abort_on_one(comm: Communicator, connection: Connection) -> None:
    comm.barrier()
    if comm.rank == 1:
        comm.abort("out of data")
        return
    comm.all_reduce(torch.ones(100_000))


def test_abort_reaches_every_peer_at_once(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3, abort_on_one) as ranks:
        for rank in (0, 2):
            (kind, message, fields), seconds = ranks.result(rank)
            assert kind == "PeerLostError"
            assert fields["lost_ranks"] == [1]
            assert "out of data" in message
            assert seconds < SOON_S


def leave_early(comm: Communicator, connection: Connection) -> None:
    comm.barrier()
    if comm.rank == 0:
        comm.close()
        return
    comm.all_reduce(torch.ones(10))


def test_a_rank_that_leaves_is_told_apart_from_one_that_dies(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, leave_early) as ranks:
        (kind, message, fields), seconds = ranks.result(1)
        assert (kind, fields["lost_ranks"]) == ("PeerLostError", [0])
        assert "exited normally" in message
        assert seconds < SOON_S


def reduce_with_one_stopped(comm: Communicator, connection: Connection) -> None:
    connection.send("running")
    if comm.rank == 2:
        connection.recv()  # the test stops this process meanwhile
    comm.all_reduce(torch.ones(100_000), "max")


def test_a_stopped_rank_is_named_at_the_deadline(tmp_path: Path) -> None:
    timeout_s = 1.5
    with Ranks(tmp_path, 3, reduce_with_one_stopped, timeout_s) as ranks:
        for connection in ranks.connections:
            assert connection.recv() == "running"
        os.kill(ranks.pids[2], signal.SIGSTOP)
        for rank in (0, 1):
            (kind, message, fields), seconds = ranks.result(rank)
            assert kind == "PeerTimeoutError"
            assert fields["missing_ranks"] == [2]
            assert (fields["seq"], fields["group"]) == (1, "world")
            assert fields["op"] == "all_reduce(max, float32[100000])"
            assert "rank 2 has called nothing yet" in message
            assert timeout_s <= seconds < timeout_s + SOON_S


def use_after_timeout(comm: Communicator, connection: Connection) -> str:
    if comm.rank == 1:
        connection.recv()
        return ""
    with pytest.raises(PeerTimeoutError):
        comm.barrier(timeout_s=0.2)
    with pytest.raises(PeerTimeoutError, match="cannot be used any more"):
        comm.all_reduce(torch.ones(2))
    comm.close()
    return "poisoned"


def test_a_timeout_poisons_the_communicator(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, use_after_timeout) as ranks:
        assert ranks.result(0)[0] == "poisoned"


def call_different_things(comm: Communicator) -> list[dict[int, str]]:
    calls = []
    for count in (10, 200_000):
        tensor = comm.empty(count)
        tensor.fill_(float(comm.rank))
        with pytest.raises(MismatchError) as caught:
            if comm.rank == 1:
                comm.broadcast(tensor, root=1)
            else:
                comm.all_reduce(tensor)
        assert (tensor == float(comm.rank)).all()  # nothing was written
        calls.append(caught.value.calls)
    for different in (torch.ones(100 + comm.rank), torch.ones(100, dtype=[torch.float32, torch.int32][comm.rank % 2])):
        with pytest.raises(MismatchError):
            comm.all_reduce(different)
    with pytest.raises(MismatchError):
        comm.broadcast(torch.ones(4), root=comm.rank % 2)
    work = comm.all_reduce(torch.ones(100 + comm.rank), async_op=True)
    with pytest.raises(MismatchError):
        work.wait()
    with pytest.raises(MismatchError):
        comm.empty(5000 * (comm.rank + 1))
    total = torch.ones(5)
    comm.all_reduce(total)  # the communicator goes on
    assert (total == comm.world_size).all()
    return calls


@pytest.mark.parametrize("world_size", [2, 3])
def test_mismatched_calls_raise_everywhere_and_name_who_called_what(pool: Pool, world_size: int) -> None:
    for calls in pool.run(world_size, call_different_things):
        for count, by_rank in zip((10, 200_000), calls, strict=True):
            for rank, call in by_rank.items():
                expected = f"broadcast(root=1, float32[{count}])" if rank == 1 else f"all_reduce(sum, float32[{count}])"
                assert call == expected


def fork_and_use(comm: Communicator, connection: Connection) -> list[str]:
    tensor = comm.empty(1000)
    tensor.fill_(1.0)
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            comm.barrier()
            writer.send("the barrier returned")
        except PycommError as error:
            writer.send(str(error))
        del tensor
        gc.collect()  # must not mark the parent's memory as free
        os._exit(0)
    message = reader.recv()
    os.waitpid(child, 0)
    comm.all_reduce(tensor)
    other = comm.empty(1000)
    assert other.data_ptr() != tensor.data_ptr()
    assert (tensor == comm.world_size).all()
    return [message]


def test_a_forked_child_is_no_rank_and_disturbs_none(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, fork_and_use) as ranks:
        for rank in (0, 1):
            (message,), _ = ranks.result(rank)
            assert "forked process" in message


def interrupt_while_waiting(comm: Communicator, connection: Connection) -> str:
    if comm.rank == 1:
        connection.recv()  # never calls
        return ""
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        comm.barrier(timeout_s=20)
    except KeyboardInterrupt:
        return "interrupted"
    return "returned"


def test_ctrl_c_ends_a_wait(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, interrupt_while_waiting) as ranks:
        result, seconds = ranks.result(0)
        assert result == "interrupted"
        assert seconds < SOON_S


def exit_with_pending_work(comm: Communicator, connection: Connection) -> None:
    work = comm.all_reduce(torch.ones(100), async_op=True)
    assert work is not None
    with pytest.raises(TimeoutError, match="goes on"):
        work.wait(timeout_s=0.05)
    assert not work.done()
    comm.abort("leaving")
    with pytest.raises(PeerLostError, match="leaving"):
        work.wait()
    comm.close()


def test_work_wait_may_run_out_without_harm(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, only_rank_zero(exit_with_pending_work)) as ranks:
        result, _ = ranks.result(0)
        assert result is None


class only_rank_zero:  # noqa: N801  (a picklable function)
    """Runs ``body`` on rank 0; the others wait for the end of the test."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body

    def __call__(self, comm: Communicator, connection: Connection) -> Any:
        if comm.rank == 0:
            return self.body(comm, connection)
        with contextlib.suppress(EOFError, ConnectionError):
            connection.recv()
        return None
