"""torch.distributed inside a pool worker: a group made for one test and destroyed after it."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pycomm
from tests.pool import TIMEOUT_S, Pool

_names = itertools.count()


@contextlib.contextmanager
def torch_distributed(comm: pycomm.Communicator, backend: str, store: str) -> Iterator[dist.ProcessGroup]:
    """``init_process_group(backend)`` over the ranks of ``comm``; the default group."""
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, comm.world_size),
        rank=comm.rank,
        world_size=comm.world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
        comm.barrier()  # gloo's peers see a rank that leaves as one that was lost
    finally:
        dist.destroy_process_group()


def _within(comm: pycomm.Communicator, backend: str, store: str, function: Callable[..., Any], args: Any) -> Any:
    torch.manual_seed(0)
    with torch_distributed(comm, backend, store):
        return function(*args)


def run(pool: Pool, world_size: int, function: Callable[..., Any], *args: Any, backend: str = "pycomm") -> list[Any]:
    """``function(*args)`` on every rank, inside an initialised torch.distributed; the results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / f"store{next(_names)}")
        return pool.run(world_size, _within, backend, store, function, args)
