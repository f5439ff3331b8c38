"""Ranks of one test: processes that may be killed, stopped or left alone, unlike those of the pool."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import pycomm
from pycomm import Communicator
from pycomm.errors import PycommError
from tests.pool import file_store, start_worker


def _run_rank(
    connect: Callable[[], Communicator], body: Callable[..., Any], args: tuple[Any, ...], connection: Connection
) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        comm = connect()
        connection.send(("ready", os.getpid()))
        connection.recv()
        start = time.monotonic()
        result: Any = body(comm, connection, *args)
    except PycommError as error:
        fields = {key: value for key, value in vars(error).items() if not key.startswith("_")}
        result = (type(error).__name__, str(error), fields)
    except BaseException as error:  # noqa: BLE001  (the test must see whatever it was)
        result = ("failed", "".join(traceback.format_exception(error)), {})
    connection.send((result, time.monotonic() - start))
    with contextlib.suppress(EOFError, ConnectionError):
        connection.recv()  # stay until the test is over


class Processes:
    """One process for each of ``connects``, which makes its communicator; ``body(comm, connection, *args)`` runs on
    all of them once all are connected."""

    def __init__(self, connects: Sequence[Callable[[], Communicator]], body: Callable[..., Any], *args: Any) -> None:
        pairs = [multiprocessing.Pipe() for _ in connects]
        self.connections = [ours for ours, _ in pairs]
        self.processes = [
            start_worker(_run_rank, connect, body, args, theirs)
            for connect, (_, theirs) in zip(connects, pairs, strict=True)
        ]
        for _, theirs in pairs:
            theirs.close()
        self.pids: list[int] = []
        for connection in self.connections:
            kind, value = connection.recv()
            assert kind == "ready", kind  # else what the rank raised
            self.pids.append(value)
        for connection in self.connections:
            connection.send("go")

    def expect(self, text: str) -> None:
        """Wait until every rank has sent this."""
        for connection in self.connections:
            received = connection.recv()
            assert received == text, received

    def result(self, rank: int) -> tuple[Any, float]:
        """What the rank's body returned or raised, and after how many seconds."""
        outcome: tuple[Any, float] = self.connections[rank].recv()
        return outcome

    def results(self) -> list[Any]:
        """What the bodies returned; the test fails if one raised."""
        found = [self.result(rank)[0] for rank in range(len(self.connections))]
        failures = [f"--- rank {r} ---\n{f[1]}" for r, f in enumerate(found) if is_error(f)]
        assert not failures, "\n".join(failures)
        return found

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGCONT)
            process.join(20)
            process.kill()
            process.join()


class Ranks(Processes):
    """``world_size`` ranks on this host, met through a file in ``folder``."""

    def __init__(
        self, folder: Path, world_size: int, body: Callable[..., Any], timeout_s: float = 30.0, args: Sequence[Any] = ()
    ) -> None:
        store = str(folder / "store")
        super().__init__(
            [functools.partial(connect_rank, store, rank, world_size, timeout_s) for rank in range(world_size)],
            body,
            *args,
        )


def connect_rank(store: str, rank: int, world_size: int, timeout_s: float) -> Communicator:
    return pycomm.init(
        "host", store=file_store(store, world_size), rank=rank, world_size=world_size, timeout_s=timeout_s
    )


def is_error(result: Any) -> bool:
    return isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], dict)


def names_held_by(pid: int) -> set[str]:
    """What this process has open that has a name: files in /dev/shm and sockets."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(fd))
    lines = [line.split() for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]]
    sockets = {line[7] for line in lines if len(line) > 7 and f"socket:[{line[6]}]" in found}
    mapped = {line.split()[5] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if " /dev/shm/" in line}
    return sockets | mapped | {name for name in found if name.startswith("/dev/shm/")}


def is_left_behind(name: str) -> bool:
    return Path(name).exists() or name in Path("/proc/net/unix").read_text(errors="replace").split()
