"""What Python code may do that runs inside a call: in a signal handler, or in another thread meanwhile."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pycomm import Communicator, communicator
from pycomm.errors import PeerLostError, PeerTimeoutError, PycommError
from tests.hosts.helpers import Hosts
from tests.pool import start_worker
from tests.processes import Ranks, connect_rank

DRAIN_S = 1.0  # in place of the ten seconds that the exit may take
HANG_S = 25.0  # a body that is not over by then hangs: its process ends, and the test fails


def during(wait: Callable[[], object], act: Callable[[], object]) -> object:
    """Run ``act`` in a signal handler inside ``wait()``; returns what ``wait`` raised."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    signal.signal(signal.SIGALRM, lambda *_: act())
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        wait()
    except PycommError as error:
        return error
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def calls_in_a_handler(comm: Communicator, connection: Connection) -> list[str]:
    """On rank 0, inside a barrier, every call that all ranks make is refused at once; the barrier goes on."""
    if comm.rank == 1:
        connection.recv()
        comm.barrier()
        comm.all_reduce(torch.ones(1))
        return []
    refused = []

    def act() -> None:
        for call in (
            comm.barrier,
            lambda: comm.split(0),
            lambda: comm.all_reduce(torch.ones(3)),
            lambda: comm.all_reduce(torch.ones(3), async_op=True),
        ):
            with pytest.raises(PycommError) as caught:
                call()
            refused.append(str(caught.value))
        connection.send("refused")

    assert during(comm.barrier, act) is None
    comm.all_reduce(torch.ones(1))
    return refused


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_a_call_inside_a_call_is_refused(tmp_path: Path, kind: str) -> None:
    """It used to wait for the call that it is inside of, for good."""
    with Ranks(tmp_path, 2, calls_in_a_handler) if kind == "shm" else Hosts("ab", calls_in_a_handler) as ranks:
        assert ranks.connections[0].recv() == "refused"
        ranks.connections[1].send("go")
        texts, _ = ranks.result(0)
        assert ranks.result(1)[0] == []
        assert len(texts) == 4
        for text in texts:
            assert "rank 0 is inside barrier()" in text
            assert "group 'world'" in text
            assert "call close() or abort()" in text


def waits(comm: Communicator) -> dict[str, Callable[[], object]]:
    def wait_for_a_flag() -> None:
        cell = comm.empty(1, dtype=torch.int64)
        comm.flag(cell.zero_()).wait(1)

    def wait_for_a_work() -> None:
        work = comm.all_reduce(torch.ones(9), async_op=True)
        assert work is not None
        work.wait()

    return {
        "collective": comm.barrier,
        "recv": lambda: comm.recv(torch.empty(9), 1),
        "work": wait_for_a_work,
        "split": lambda: comm.split(0),
        "flag": wait_for_a_flag,
    }


def close_in_a_handler(comm: Communicator, connection: Connection, what: str) -> str:
    if comm.rank == 1:
        if what == "flag":
            comm.empty(1, dtype=torch.int64)
        connection.recv()
        with pytest.raises(PeerLostError, match="rank 0 aborted: closed inside") as caught:
            comm.barrier()
        assert caught.value.lost_ranks == [0]
        return "told"
    error = during(waits(comm)[what], comm.close)
    assert isinstance(error, PeerLostError), error
    assert "closed inside" in str(error)
    with pytest.raises(PycommError, match="'world' is closed"):
        comm.barrier()
    comm.close()
    return "ended"


@pytest.mark.parametrize(
    "case",
    ["shm collective", "shm recv", "shm work", "shm split", "shm flag", "gloo collective", "gloo recv", "gloo work"],
)
def test_close_in_a_handler_ends_the_call_that_it_is_inside_of(tmp_path: Path, case: str) -> None:
    """close() used to wait for that call, without a deadline; peers are told."""
    kind, _, what = case.partition(" ")
    body = Bound(close_in_a_handler, what)
    with Ranks(tmp_path, 2, body) if kind == "shm" else Hosts("ab", close_in_a_handler, what) as ranks:
        result, seconds = ranks.result(0)
        assert result == "ended", result
        assert seconds < HANG_S
        ranks.connections[1].send("go")
        assert ranks.result(1)[0] == "told"


def close_in_another_thread(comm: Communicator, connection: Connection, what: str) -> str:
    if comm.rank == 1:
        connection.recv()
        return ""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    closer = threading.Timer(0.2, comm.close)
    closer.start()
    wait = comm.barrier if what == "collective" else lambda **options: comm.recv(torch.empty(9), 1, **options)
    with pytest.raises(PeerLostError, match="closed with operations that no peer had joined"):
        wait(timeout_s=600)
    closer.join()
    faulthandler.cancel_dump_traceback_later()
    return "ended"


@pytest.mark.parametrize("what", ["collective", "recv"])
def test_close_in_another_thread_waits_for_its_timeout_only(tmp_path: Path, what: str) -> None:
    with Ranks(tmp_path, 2, Bound(close_in_another_thread, what), timeout_s=1.0) as ranks:
        assert ranks.result(0)[0] == "ended"


def two_threads(comm: Communicator, connection: Connection) -> str:
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    if comm.rank == 1:
        connection.recv()
        comm.barrier()
    else:
        other = threading.Thread(target=comm.barrier)
        other.start()
        other.join(0.3)  # in its call by then
        with pytest.raises(PeerTimeoutError, match=r"another thread is inside barrier\(\) #1 of group 'world'"):
            comm.barrier(timeout_s=0.2)
        connection.send("expired")
        other.join()
    comm.barrier()
    faulthandler.cancel_dump_traceback_later()
    return "went on"


def test_the_turn_of_another_thread_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, two_threads) as ranks:
        assert ranks.connections[0].recv() == "expired"
        ranks.connections[1].send("go")
        assert ranks.results() == ["went on"] * 2


class Bound:
    """A picklable ``body(comm, connection, *args)``."""

    def __init__(self, body: Callable[..., Any], *args: Any) -> None:
        self.body, self.args = body, args

    def __call__(self, comm: Communicator, connection: Connection) -> Any:
        return self.body(comm, connection, *self.args)


def destroy_in_a_handler(comm: Communicator, connection: Connection) -> str:
    if comm.rank == 1:
        dist.init_process_group("pycomm", init_method=connection.recv(), rank=1, world_size=2)
        connection.recv()
        return ""
    dist.init_process_group("pycomm", init_method=connection.recv(), rank=0, world_size=2)
    error = during(dist.barrier, dist.destroy_process_group)
    assert isinstance(error, PeerLostError), error
    assert not dist.is_initialized()
    return "ended"


def test_destroy_process_group_in_a_handler(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, destroy_in_a_handler) as ranks:
        for connection in ranks.connections:
            connection.send(f"file://{tmp_path}/torch")
        assert ranks.result(0)[0] == "ended"


DAEMONS = f"""
import sys, threading, time, torch, torch.distributed as dist, pycomm
pycomm.communicator._EXIT_DRAIN_S = {DRAIN_S}
comm = pycomm.init("host", store=dist.FileStore(sys.argv[1], 2), rank=0, world_size=2, timeout_s=600)
parts = [comm.split(0), comm.split(0)]
for wait in (comm.barrier, parts[0].barrier, lambda: parts[1].recv(torch.empty(3), 1), lambda: comm.split(0)):
    threading.Thread(target=wait, daemon=True).start()
time.sleep(0.5)  # in their calls by then
print("leaving", flush=True)
"""


def stay(store: str, end: Connection) -> None:
    comm = connect_rank(store, 1, 2, 600)
    parts = [comm.split(0), comm.split(0)]
    assert all(parts)
    end.poll(None)


def test_daemon_threads_in_calls_do_not_hold_the_exit(tmp_path: Path) -> None:
    """Ten seconds in all, however many communicators have calls under way: docs/errors.md."""
    ours, theirs = multiprocessing.Pipe()
    other = start_worker(stay, str(tmp_path / "store"), theirs)
    command = [sys.executable, "-c", DAEMONS, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "leaving\n"
            start = time.monotonic()
            assert process.wait(DRAIN_S + HANG_S) == 0
            assert time.monotonic() - start < DRAIN_S + 5
        finally:
            process.kill()
            ours.close()
            other.kill()
            other.join()


def until_it_fails(call: Callable[[], object]) -> None:
    with contextlib.suppress(PycommError):
        call()


def exit_with_threads(comm: Communicator, connection: Connection) -> float:
    parts = [comm.split(0) for _ in range(3)]
    if comm.rank == 1:
        connection.recv()
        return 0.0
    communicator._EXIT_DRAIN_S = DRAIN_S
    for part in parts:
        assert part is not None
        for wait in (part.barrier, functools.partial(part.recv, torch.empty(3), 1)):
            threading.Thread(target=until_it_fails, args=(wait,), daemon=True).start()
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    start = time.monotonic()
    atexit._run_exitfuncs()  # a worker of multiprocessing ends without them
    faulthandler.cancel_dump_traceback_later()
    return time.monotonic() - start


def test_daemon_threads_in_calls_between_hosts_do_not_hold_the_exit() -> None:
    with Hosts("ab", exit_with_threads) as hosts:
        seconds, _ = hosts.result(0)
        assert seconds < DRAIN_S + 10  # each communicator may take another second to say farewell


def use_after_close(comm: Communicator, connection: Connection) -> list[str]:
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    comm.close()
    texts = []
    for call in (
        comm.barrier,
        lambda: comm.all_reduce(torch.ones(1)),
        lambda: comm.all_reduce(torch.ones(1), async_op=True),
        lambda: comm.empty(3),
        lambda: comm.split(0),
        lambda: comm.send(torch.ones(1), 1 - comm.rank),
        lambda: comm.recv(torch.ones(1)),
    ):
        with pytest.raises(PycommError) as caught:
            call()
        texts.append(str(caught.value))
    faulthandler.cancel_dump_traceback_later()
    return texts


@pytest.mark.parametrize("layout", ["ab", "aa"])
def test_a_closed_communicator_refuses_every_call(layout: str) -> None:
    """On gloo they used to be accepted, and never ended."""
    with Hosts(layout, use_after_close, backend="gloo" if layout == "ab" else "auto") as hosts:
        for texts in hosts.results():
            assert set(texts) == {"communicator 'world' is closed"}
