"""Ranks of several hosts on one machine: each process is told which host it is on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import pycomm
from pycomm import Communicator
from pycomm.errors import PycommError
from tests.pool import TIMEOUT_S, start_worker

LAYOUTS = ("aabb", "abb", "abab", "aaab", "abc")  # a letter a rank: its host


def hosts_of(layout: str) -> tuple[tuple[int, ...], ...]:
    """The ranks of each host, hosts in the order of their lowest rank."""
    return tuple(tuple(r for r, name in enumerate(layout) if name == host) for host in dict.fromkeys(layout))


def connect_rank(port: int, layout: str, rank: int, backend: str, timeout_s: float, strict: bool) -> Communicator:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    with patch("pycomm.rendezvous.host_identity", lambda: layout[rank]):
        return pycomm.init(backend, store=store, rank=rank, world_size=len(layout), timeout_s=timeout_s, strict=strict)


def _run_rank(
    body: Callable[..., Any],
    args: tuple[Any, ...],
    connection: Connection,
    port: int,
    layout: str,
    rank: int,
    backend: str,
    timeout_s: float,
    strict: bool,
) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        comm = connect_rank(port, layout, rank, backend, timeout_s, strict)
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


class Hosts:
    """Processes of one test, a letter of ``layout`` each; ``body(comm, connection, *args)`` runs on all."""

    def __init__(
        self,
        layout: str,
        body: Callable[..., Any],
        *args: Any,
        backend: str = "auto",
        timeout_s: float = TIMEOUT_S,
        strict: bool = False,
    ) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pairs = [multiprocessing.Pipe() for _ in layout]
        self.connections = [ours for ours, _ in pairs]
        self.processes = [
            start_worker(_run_rank, body, args, theirs, self._store.port, layout, rank, backend, timeout_s, strict)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for _, theirs in pairs:
            theirs.close()
        self.pids: list[int] = []
        for connection in self.connections:
            kind, value, *_ = connection.recv()
            assert kind == "ready", value
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

    def __enter__(self) -> Hosts:
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


def is_error(result: Any) -> bool:
    return isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], dict)
