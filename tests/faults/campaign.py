"""One fault: a job of a few processes runs a program, one rank fails, and what the others say of it is checked."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

import pycomm
from pycomm import _C, Communicator
from pycomm.errors import PycommError
from tests.faults import programs
from tests.hosts.helpers import Hosts
from tests.processes import is_left_behind, names_held_by

SOON_S = 20.0  # a failure is seen within two seconds where the machine has time; here ranks and tests share two cores
STOPPED_S = 8.0  # the timeout of jobs in which a rank is stopped: torch's stores may wait 5 s for a name server
PATIENT_S = 90.0  # that of the others: an error long before it was seen, not timed out
FIRST_STEPS = 2  # before the fault, so that it hits a job that runs

INSIDE = ("raise", "abort", "close", "exit", "interrupt")  # what the victim does itself
OUTSIDE = ("kill", "stop")  # what is done to it
FAULTS = INSIDE + OUTSIDE
IMPOSSIBLE = {("torch_distributed", "abort"), ("torch_distributed", "close")}  # torch has no such calls
PROGRAMS = {
    function.__name__: function
    for function in (
        programs.collectives,
        programs.messages,
        programs.split_groups,
        programs.births,
        programs.meetings,
        programs.data_parallel,
        programs.tensor_parallel,
        programs.pipeline,
        programs.mesh,
        programs.pretraining,
        programs.torch_distributed,
    )
}
# Layers that need memory which all ranks map.
ONE_HOST = {"tensor_parallel", "pipeline", "mesh"}


@dataclass(frozen=True)
class Case:
    """A fault, by its seed.

    Attributes:
        layout: a letter a rank, its host; a single letter: all share one.
        after: steps of the program before a fault that the victim makes itself.
        delay_s: seconds until one that is made from outside.
        orderly: ranks leave as a script ends; else as one that is killed, in the middle of whatever there is to do.
    """

    seed: int
    program: str
    fault: str
    layout: str
    victim: int
    after: int
    delay_s: float
    orderly: bool

    @classmethod
    def of(cls, seed: int) -> Case:
        rng = random.Random(seed)
        names = list(PROGRAMS)
        turn, place = divmod(seed, len(names))
        program, fault = names[place], FAULTS[(turn + place) % len(FAULTS)]  # all pairs, in turn
        if (program, fault) in IMPOSSIBLE:
            fault = "raise"
        layouts = ["aa", "aaa", "aaaa"] if program in ONE_HOST or rng.random() < 0.5 else ["ab", "abb", "aabb", "abab"]
        if program == "mesh":
            layouts = ["aaaa"]
        layout = rng.choice(layouts)
        return cls(
            seed,
            program,
            fault,
            layout,
            rng.randrange(len(layout)),
            rng.randint(2, 30),
            rng.random() * 0.1,
            rng.random() < 0.5,
        )

    @property
    def timeout_s(self) -> float:
        return STOPPED_S if self.fault == "stop" else PATIENT_S


class PlantedError(Exception):
    """What a victim raises."""


def run_rank(comm: Communicator, connection: Connection, case: Case, folder: Path, port: int) -> None:
    """A rank of the job, from the start of its program to the end of its process. A survivor sends how it ended."""
    outcome = run_program(comm, connection, case, folder, port)
    if comm.rank != case.victim:
        connection.send((outcome, 0.0))
    if case.orderly:
        atexit._run_exitfuncs()  # what a script does at its end; processes of multiprocessing leave that out
    os._exit(1)


def run_program(comm: Communicator, connection: Connection, case: Case, folder: Path, port: int) -> Any:
    """The program in the communicator's context, as a script would have it.

    Returns:
        Of a survivor: the error's class, message and fields, and the groups of the job.
    """
    job = programs.Job(comm, random.Random(case.seed), folder, functools.partial(meet, comm, case, store_at(port)))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(comm)
            if case.program == "torch_distributed":
                stack.enter_context(torch_job(comm, case, port))
            job.note(comm)
            connection.send(_C.process_token())
            for turn, _ in enumerate(PROGRAMS[case.program](job)):
                if turn == FIRST_STEPS:
                    connection.send("running")
                if comm.rank == case.victim and turn == FIRST_STEPS + case.after and case.fault in INSIDE:
                    connection.recv()  # once all are running
                    connection.send("failing")
                    fail(comm, case.fault)
    except (PlantedError, KeyboardInterrupt):
        return "left"
    except PycommError as error:
        return type(error).__name__, str(error), {**vars(error), "groups": job.groups}
    except RuntimeError as error:
        # torch's C++ keeps of an error in a future only the text.
        found = re.search(r"Peer(Lost|Timeout)Error: .*", str(error))
        if case.program != "torch_distributed" or found is None:
            raise
        return "text", found[0], {"groups": job.groups}
    return "ended"


@contextlib.contextmanager
def torch_job(comm: Communicator, case: Case, port: int) -> Iterator[None]:
    """torch.distributed on pycomm, over the job's hosts."""
    store = dist.PrefixStore("torch", store_at(port))
    timeout = timedelta(seconds=case.timeout_s)
    with patch("pycomm.records.host_identity", lambda: case.layout[comm.rank]):
        dist.init_process_group("pycomm", store=store, rank=comm.rank, world_size=comm.world_size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def store_at(port: int) -> dist.Store:
    return dist.TCPStore("127.0.0.1", port, is_master=False)


def meet(comm: Communicator, case: Case, store: dist.Store) -> Communicator:
    """One more communicator of all ranks of ``comm``, over the job's hosts."""
    rounds = dist.PrefixStore("rounds", store)
    with patch("pycomm.records.host_identity", lambda: case.layout[comm.rank]):
        return pycomm.init(
            store=rounds, rank=comm.rank, world_size=comm.world_size, timeout_s=case.timeout_s, name="meeting"
        )


def fail(comm: Communicator, fault: str) -> None:
    """Do what the fault is. After an interrupt the program goes on, until the signal comes."""
    if fault == "abort":
        comm.abort("planted")
    elif fault == "close":
        comm.close()
    elif fault == "exit":
        os._exit(3)
    elif fault == "interrupt":
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        return
    raise PlantedError("planted")


def problems_of(case: Case, folder: Path) -> list[str]:
    """Run the case, with files in ``folder``; what is wrong with what others saw of it, and what was left behind."""
    problems = []
    with Hosts(case.layout, run_rank, case, folder, timeout_s=case.timeout_s, with_port=True) as job:
        tokens = [connection.recv() for connection in job.connections]
        job.expect("running")
        names = set().union(*map(names_held_by, job.pids))
        if case.fault in INSIDE:
            job.connections[case.victim].send("go")
            if not job.connections[case.victim].poll(PATIENT_S):
                return ["the job hangs before the fault"]
            assert job.connections[case.victim].recv() == "failing"
        else:
            time.sleep(case.delay_s)
            os.kill(job.pids[case.victim], signal.SIGKILL if case.fault == "kill" else signal.SIGSTOP)
        deadline = time.monotonic() + SOON_S + (STOPPED_S if case.fault == "stop" else 0)
        for rank in range(len(case.layout)):
            if rank == case.victim:
                continue
            if not job.connections[rank].poll(max(0.0, deadline - time.monotonic())):
                problems.append(f"rank {rank} hangs")
                os.kill(job.pids[rank], signal.SIGKILL)  # it would not leave by itself
                continue
            outcome, _ = job.result(rank)
            problem = verdict(case, tokens[case.victim], *outcome) if isinstance(outcome, tuple) else str(outcome)
            problems += [f"rank {rank}: {problem}"] if problem else []
    problems += [f"left behind: {name}" for name in names if is_left_behind(name)]
    problems += [f"process {pid} is left" for pid in job.pids if Path(f"/proc/{pid}").exists()]
    return problems


def verdict(case: Case, token: int, kind: str, message: str, fields: dict[str, Any]) -> str:
    """What is wrong with how a survivor's program ended; empty: nothing.

    Args:
        token: the identity of the victim's process.
    """
    if kind == "text":
        return "" if re.search(rf"\brank {case.victim}\b", message) else f"does not name the victim: {message}"
    if kind not in ("PeerLostError", "PeerTimeoutError") or (kind == "PeerTimeoutError" and case.fault != "stop"):
        return f"{kind}: {message}"
    group = fields["groups"].get(fields["group"], [])
    named = [group[rank] for rank in fields.get("lost_ranks", fields.get("missing_ranks")) if group]
    processes, _ = fields.get("_root", ((), ""))
    if fields["group"]:
        right = list(processes) == [token] and (case.victim not in group or named == [case.victim])
    else:  # in init: nobody may know the processes yet, and survivors that learnt of the victim earlier may have ended
        right = case.victim in named and (token in processes or not processes)
    return "" if right else f"{kind}, {fields}: {message}"
