"""How ranks meet when things go wrong: another job on the port, a rank that dies or fails on the way, many rounds."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import pycomm
from pycomm import Communicator, env
from pycomm.errors import PycommError
from tests.pool import file_store, start_worker
from tests.processes import Ranks
from tests.test_init import free_port, launch_variables

SOON_S = 10.0  # generous: the machine may be busy; the deadlines are far behind it
TIMEOUT_S = 60.0


def _run(connection: Connection, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        outcome: Any = body(*args)
    except Exception as error:  # noqa: BLE001  (the test must see whatever it was)
        notes = getattr(error, "__notes__", [])
        outcome = (type(error).__name__, "\n".join([str(error), *notes]), getattr(error, "lost_ranks", None))
    connection.send((outcome, time.monotonic() - start))


class Rank:
    """A process that runs ``body(*args)``, whose outcome or error it sends back."""

    def __init__(self, body: Callable[..., Any], *args: Any) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.process = start_worker(_run, theirs, body, args)
        theirs.close()

    def outcome(self, limit_s: float = TIMEOUT_S) -> tuple[Any, float]:
        """What it returned, or its error's class, text and lost ranks; after how many seconds."""
        try:
            assert self.connection.poll(limit_s), "no outcome"
            result: tuple[Any, float] = self.connection.recv()
        except EOFError:
            self.process.join(limit_s)
            raise AssertionError(f"the process ended with {self.process.exitcode}") from None
        finally:
            self.process.kill()  # it has sent all, or it hangs
        self.process.join(limit_s)
        return result


def member(folder: str, job: str, rank: int, port: str, turn: Connection) -> tuple[str, str, list[int]]:
    """A rank of one of two jobs whose processes all have one parent; their variables lie in ``folder``, by process."""

    def launch_of(pid: int) -> env.Launch | None:
        path = Path(folder, str(pid))
        return env._launch(json.loads(path.read_text())) if path.exists() else None

    os.environ.update(launch_variables(rank, 2, port))
    Path(folder, str(os.getpid())).write_text(json.dumps(launch_variables(rank, 2, port)))
    turn.send("started")
    turn.recv()
    with patch("pycomm.env.launch_of", launch_of, create=True):
        comm = pycomm.init(timeout_s=TIMEOUT_S)
    tensor = torch.ones(1)
    comm.all_reduce(tensor)
    return "paired", f"rank {rank} of job {job} has the sum {tensor.item()}", []


def test_two_jobs_on_one_port_do_not_pair(tmp_path: Path) -> None:
    """Rank 0 of job A and rank 1 of job B come first, and must not give each other a sum. Nor may the other two, who
    come when job B's has ended."""
    port, turns, ranks = str(free_port()), {}, {}
    for name in ("A0", "A1", "B0", "B1"):
        turns[name], theirs = multiprocessing.Pipe()
        ranks[name] = Rank(member, str(tmp_path), name[0], int(name[1]), port, theirs)
        assert turns[name].recv() == "started"
    for name in ("A0", "B1"):
        turns[name].send("go on")
    outcomes = [ranks["B1"].outcome()[0]]
    for name in ("B0", "A1"):
        turns[name].send("go on")
        outcomes.append(ranks[name].outcome()[0])
    outcomes.append(ranks["A0"].outcome()[0])
    for kind, text, _ in outcomes:
        assert kind == "PycommError", text
        assert all(part in text for part in ("two processes are rank", f"MASTER_PORT={port}"))


def join(rank: int, world_size: int, port: str, until: Connection | None) -> str:
    os.environ.update(launch_variables(rank, world_size, port))
    comm = pycomm.init(timeout_s=TIMEOUT_S)
    tensor = torch.ones(1)
    comm.all_reduce(tensor)
    if until is not None:
        until.send("met")
        until.recv()
        comm.all_reduce(tensor)
    comm.close()
    return f"sum {tensor.item()}"


def test_a_second_job_on_the_port_of_a_running_one_is_refused_alone() -> None:
    port, pipes = str(free_port()), [multiprocessing.Pipe() for _ in range(2)]
    first = [Rank(join, rank, 2, port, pipes[rank][1]) for rank in range(2)]
    for ours, _ in pipes:
        assert ours.recv() == "met"
    for rank in range(2):
        (kind, text, _), seconds = Rank(join, rank, 2, port, None).outcome()
        assert kind == "PycommError", text
        assert all(part in text for part in (f"MASTER_PORT={port}", f"are rank {rank}", str(first[rank].process.pid)))
        assert seconds < SOON_S
    for ours, _ in pipes:
        ours.send("go on")
    assert [rank.outcome()[0] for rank in first] == ["sum 4.0"] * 2


def join_again_and_again(rank: int, world_size: int, port: str, num_rounds: int) -> int:
    os.environ.update(launch_variables(rank, world_size, port))
    for turn in range(num_rounds):
        with pycomm.init(timeout_s=TIMEOUT_S) as comm:
            tensor = torch.full((1,), float(turn))
            comm.all_reduce(tensor)
            assert tensor.item() == world_size * turn
    return num_rounds


def test_init_and_close_again_and_again() -> None:
    """Rank 0's store must serve those that still read from it, and those that come early for the next round."""
    port = str(free_port())
    ranks = [Rank(join_again_and_again, rank, 3, port, 100) for rank in range(3)]
    outcomes = [rank.outcome()[0] for rank in ranks]
    assert outcomes == [100] * 3, outcomes


def end_here(*_: object, dies: bool) -> None:
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError("no luck here")


def init_with_a_victim(rank: int, victim: int, place: str, dies: bool, path: str, backend: str) -> None:
    if rank == victim:
        with patch(place, lambda *args, **kwargs: end_here(dies=dies)):
            pycomm.init(backend, store=file_store(path, 3), rank=rank, world_size=3, timeout_s=TIMEOUT_S)
    pycomm.init(backend, store=file_store(path, 3), rank=rank, world_size=3, timeout_s=TIMEOUT_S)


ARRIVAL = "pycomm.communicator.Rendezvous._arrive"
GREETING = "pycomm.communicator.Rendezvous.greet"
CONNECTION = "pycomm.communicator.ShmBackend.connect"
GLOO = "pycomm.backends.gloo.backend.open_device"


@pytest.mark.parametrize(
    ("victim", "place", "dies", "backend"),
    [
        (1, ARRIVAL, True, "host"),
        (1, GREETING, True, "host"),
        (0, CONNECTION, True, "host"),
        (2, CONNECTION, True, "host"),
        (1, CONNECTION, False, "host"),
        (0, CONNECTION, False, "host"),
        (1, GLOO, True, "gloo"),
        (2, GLOO, False, "gloo"),
    ],
)
def test_a_rank_that_ends_inside_init_is_named_at_once(
    tmp_path: Path, victim: int, place: str, dies: bool, backend: str
) -> None:
    """Not at the deadline, and not a neighbour that noticed first."""
    path = str(tmp_path / "store")
    ranks = [Rank(init_with_a_victim, rank, victim, place, dies, path, backend) for rank in range(3)]
    for number, rank in enumerate(ranks):
        if number == victim:
            continue
        (kind, text, lost), seconds = rank.outcome()
        assert (kind, lost) == ("PeerLostError", [victim]), text
        assert ("died" if dies else "OSError: no luck here") in text
        assert seconds < SOON_S
    ranks[victim].process.join()


def split_with_a_victim(comm: Communicator, connection: Connection, victim: int) -> None:
    if comm.rank == victim and victim == 1:  # it leads, and a limit ends it when it makes the group's memory
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.RLIM_INFINITY))
    elif comm.rank == victim:  # it has no descriptor left for its socket
        used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, used + 1))
    comm.split(0 if comm.rank == 0 else 1)
    if comm.rank != 0:
        return
    comm.barrier()


@pytest.mark.parametrize("victim", [1, 3])
def test_a_rank_that_ends_inside_split_is_named_at_once(tmp_path: Path, victim: int) -> None:
    """By its number in the group that is split; rank 0, in another part, is told by its next call."""
    with Ranks(tmp_path, 4, split_with_a_victim, TIMEOUT_S, [victim]) as ranks:
        for rank in {0, 1, 2, 3} - {victim}:
            (kind, text, fields), seconds = ranks.result(rank)
            assert (kind, fields.get("lost_ranks")) == ("PeerLostError", [victim]), text
            assert seconds < SOON_S


def test_a_port_that_answers_nothing_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's store waits without a deadline for the first answer of whatever listens there."""

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in launch_variables(1, 2, str(taken.getsockname()[1])).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PycommError, match="no store at .*said nothing"):
            pycomm.init(timeout_s=0.5)
