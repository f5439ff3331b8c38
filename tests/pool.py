"""Persistent worker processes for the tests: one pool per world size, started on first use.

Importing torch takes seconds, so workers are forked from one server process that has imported it already. A test
hands a module-level function to :meth:`Pool.run`; each worker calls it with its communicator. A worker that fails in
a collective has poisoned its communicator, so the pool of that size is replaced before the next use.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import pycomm

TIMEOUT_S = 60.0  # of any wait inside a test; generous, since the machine may be busy
# Messages of several slices, and of more than the caches are said to hold, shall be quick to test.
TUNE = "slice_bytes=64K,cached_bytes=200K"

_context = multiprocessing.get_context("forkserver")
# The last two bring most of what the programs of tests/faults import, which takes longer than a whole job.
_context.set_forkserver_preload(["torch", "pycomm", "tests.pool", "torch._dynamo", "tests.faults.programs"])


class WorkerError(AssertionError):
    """A function failed on some ranks; carries their tracebacks."""


def start_worker(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """A forked process with torch and pycomm already imported."""
    process = _context.Process(target=target, args=args, daemon=False)
    process.start()
    return process


def file_store(path: str, world_size: int) -> dist.Store:
    """A store without a port, for the processes of one test."""
    return dist.FileStore(path, world_size)


def _serve(connection: Connection, rank: int, world_size: int, store_path: str) -> None:
    torch.set_num_threads(1)
    os.environ["PYCOMM_TUNE"] = TUNE
    comm = pycomm.init(
        "host",
        store=file_store(store_path, world_size),
        rank=rank,
        world_size=world_size,
        timeout_s=TIMEOUT_S,
        strict=True,
    )
    connection.send(None)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            break
        try:
            outcome = (True, function(comm, *args))
        except BaseException as error:  # noqa: BLE001  (the test must see whatever it was)
            outcome = (False, "".join(traceback.format_exception(error)))
        connection.send(outcome)
    comm.close()


class _Workers:
    def __init__(self, world_size: int, store_path: str) -> None:
        pairs = [_context.Pipe() for _ in range(world_size)]
        self.connections = [ours for ours, _ in pairs]
        self.processes = [
            start_worker(_serve, theirs, rank, world_size, store_path) for rank, (_, theirs) in enumerate(pairs)
        ]
        for _, theirs in pairs:
            theirs.close()
        for connection in self.connections:
            connection.recv()

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()


class Pool:
    """Runs functions on persistent ranks; see the module."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._workers: dict[int, _Workers] = {}
        self._num_started = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(comm, *args)`` on every rank; returns the results by rank.

        Raises:
            WorkerError: it raised on some rank; has the tracebacks of all that did.
        """
        if world_size not in self._workers:
            self._num_started += 1
            self._workers[world_size] = _Workers(world_size, f"{self._folder}/store{self._num_started}")
        workers = self._workers[world_size]
        for connection in workers.connections:
            connection.send((function, args))
        outcomes = []
        for rank, connection in enumerate(workers.connections):
            try:
                outcomes.append(connection.recv())
            except EOFError:
                outcomes.append((False, f"rank {rank} died"))
        failures = [f"--- rank {rank} ---\n{value}" for rank, (ok, value) in enumerate(outcomes) if not ok]
        if failures:
            self._workers.pop(world_size).stop()
            raise WorkerError("\n".join(failures))
        return [value for _, value in outcomes]

    def close(self) -> None:
        for workers in self._workers.values():
            workers.stop()
        self._workers.clear()
