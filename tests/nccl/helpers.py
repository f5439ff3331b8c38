"""Ranks whose NCCL and GPU are the stand-in (``standin/``): the back end's own code, on CPU tensors.

As on a GPU, a call returns before it is done; what a test reads it reads after ``comm.synchronize()``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import pycomm
from pycomm import _C, Communicator
from pycomm.backends.nccl import NcclBackend, Offer, backend
from tests.hosts.helpers import connect_rank
from tests.nccl.kernels import KernelMemory
from tests.pool import TIMEOUT_S, Pool, file_store
from tests.processes import Processes

SOON_S = 5.0  # generous, since ranks share cores

_process = contextlib.ExitStack()  # what lasts as long as a process of ranks() does


class StandInGpu:
    """What :class:`pycomm.backends.nccl.gpu.Gpu` is on a GPU, and what tests do with the stand-in.

    Args:
        path: of the stand-in's library.
    """

    def __init__(self, path: str) -> None:
        self.device = torch.device("cpu")
        self.driver = _C.CudaDriver([path])
        self.core = _C.CudaDevice(self.driver, 0)
        self.library = ctypes.CDLL(path)
        self.library.standin_stream.restype = ctypes.c_void_p
        self.stream = self.new_stream()
        self.holds = True
        self._held: list[torch.Tensor] = []
        self.memory = KernelMemory(self.library)
        self.closing = contextlib.ExitStack()  # what is to be undone when this process stands in no longer

    def __getattr__(self, name: str) -> Any:
        """Memory that ranks map, and kernels."""
        return getattr(self.memory, name)

    def new_stream(self) -> int:
        return int(self.library.standin_stream())

    def hold(self, tensor: torch.Tensor | None) -> None:
        """On a GPU the memory of a tensor that is dropped is used again in the order of its stream; here never."""
        if self.holds and tensor is not None:
            self._held.append(tensor)

    def current_stream(self) -> int:
        return self.stream

    def copy_later(self, to: torch.Tensor, source: torch.Tensor, delay_s: float) -> None:
        """What a kernel would write on the current stream, if it took so long."""
        assert to.nbytes == source.nbytes
        self._held += [to, source]
        pointers = (ctypes.c_void_p(self.stream), ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(source.data_ptr()))
        self.library.standin_copy(*pointers, ctypes.c_size_t(to.nbytes), int(delay_s * 1000))

    def synchronize(self) -> None:
        """Wait for the current stream."""
        assert self.library.standin_synchronize(ctypes.c_void_p(self.stream), int(TIMEOUT_S * 1000)) == 1


@contextlib.contextmanager
def read_by_the_host() -> Iterator[None]:
    """Calls wait for their end, as a program does on a GPU when it reads a tensor on the host."""
    enqueue = NcclBackend._enqueue

    def enqueue_and_wait(*args: Any) -> _C.NcclOperation:
        operation = enqueue(*args)
        operation.reach(TIMEOUT_S)
        return operation

    with patch.object(NcclBackend, "_enqueue", enqueue_and_wait):
        yield


def eventually(condition: Callable[[], bool]) -> None:
    """Return once other threads or ranks have made it true."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def until_it_fails(wait: Callable[[], object]) -> None:
    """Wait for what was enqueued, and for the watchdog to find out what is wrong with it; raises that."""

    def has_not_failed() -> bool:
        wait()
        return False

    eventually(has_not_failed)


def gpu_of(comm: Communicator) -> StandInGpu:
    return comm._backend._gpu  # type: ignore[attr-defined,no-any-return]


@contextlib.contextmanager
def standing_in(path: str, folder: str) -> Iterator[StandInGpu]:
    """``init("nccl")`` of this process takes the stand-in at ``path``, whose ranks meet in ``folder``."""
    gpu = StandInGpu(path)
    submit, exchange, prefixes = NcclBackend.submit, NcclBackend.exchange, backend._prefixes

    def submit_and_hold(self: NcclBackend, call: _C.Call, *args: Any) -> _C.Work | None:
        for tensor in args[:2]:
            gpu.hold(tensor)
        return submit(self, call, *args)

    def prefixes_held(*args: Any) -> torch.Tensor:
        made = prefixes(*args)
        gpu.hold(made)
        return made

    def exchange_and_hold(self: NcclBackend, messages: Any, *args: Any) -> _C.Work | list[int]:
        for _, tensor in messages:
            gpu.hold(tensor)
        return exchange(self, messages, *args)

    with (
        patch.dict(os.environ, {"PYCOMM_NCCL_SO": path, "STANDIN_FOLDER": folder}),
        patch("pycomm.backends.nccl.gpu.Gpu.of_this_rank", lambda device=None: gpu),
        patch("pycomm.communicator.offer", lambda asked_for: Offer("2.32.3", "", gpu.driver.device_uuid(0))),
        patch.object(NcclBackend, "submit", submit_and_hold),
        patch.object(NcclBackend, "exchange", exchange_and_hold),
        patch.object(backend, "_prefixes", prefixes_held),
    ):
        yield gpu


Setup = Callable[[StandInGpu, int], None]


def with_kernels(gpu: StandInGpu, rank: int) -> None:
    """A ``setup``: this build has pycomm's kernels, and ranks map each other's memory."""
    gpu.memory.obstacle = ""


def run(
    pool: Pool,
    size: int,
    standin: Path,
    folder: Path,
    body: Callable[..., Any],
    *args: Any,
    setup: Setup | None = None,
) -> list[Any]:
    """``body(comm, *args)`` on persistent ranks. ``setup(gpu, rank)`` comes before they meet."""
    return pool.run(size, _with_comm, str(standin), str(folder), body, args, setup)


def _with_comm(
    host: Communicator, path: str, folder: str, body: Callable[..., Any], args: tuple[Any, ...], setup: Setup | None
) -> Any:
    with standing_in(path, folder) as gpu, gpu.closing:
        if setup is not None:
            setup(gpu, host.rank)
        return _run_with_comm(host, folder, body, args)


def _run_with_comm(host: Communicator, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with _init(folder, host.rank, host.world_size, TIMEOUT_S) as comm:
        result = body(comm, *args)
        comm.barrier()
        return result


def ranks(
    size: int,
    standin: Path,
    folder: Path,
    body: Callable[..., Any],
    *args: Any,
    timeout_s: float,
    setup: Setup | None = None,
) -> Processes:
    """Processes of their own, which may end."""
    connects = [partial(_connect, str(standin), str(folder), rank, size, timeout_s, setup) for rank in range(size)]
    return Processes(connects, body, *args)


def ranks_on_hosts(
    layout: str, port: int, standin: Path, folder: Path, body: Callable[..., Any], setup: Setup | None = None
) -> Processes:
    """A letter a rank: its host. ``port``: of a store."""
    places = [(layout, port, str(standin), str(folder), rank, setup) for rank in range(len(layout))]
    return Processes([partial(_connect_on, *place) for place in places], body)


def _stand_in(path: str, folder: str, rank: int, setup: Setup | None) -> None:
    gpu = _process.enter_context(standing_in(path, folder))
    if setup is not None:
        setup(gpu, rank)


def _connect(path: str, folder: str, rank: int, size: int, timeout_s: float, setup: Setup | None) -> Communicator:
    _stand_in(path, folder, rank, setup)
    return _init(folder, rank, size, timeout_s)


def _connect_on(layout: str, port: int, path: str, folder: str, rank: int, setup: Setup | None) -> Communicator:
    _stand_in(path, folder, rank, setup)
    return connect_rank(port, layout, rank, "nccl", TIMEOUT_S, False)


def _init(folder: str, rank: int, size: int, timeout_s: float) -> Communicator:
    store = file_store(f"{folder}/store", size)
    return pycomm.init("nccl", store=store, rank=rank, world_size=size, timeout_s=timeout_s)
