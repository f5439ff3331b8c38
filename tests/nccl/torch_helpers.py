"""torch.distributed's back end "pycomm" with the stand-in for its CUDA tensors, whose place CPU tensors take.

What is replaced is what needs a GPU to exist: which communicator a tensor goes to, and torch's streams and events.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from pycomm import Communicator
from pycomm.torch_backend import tensors
from pycomm.torch_backend.communicators import Communicators
from tests.nccl.helpers import StandInGpu, standing_in
from tests.pool import Pool
from tests.torch_backend.helpers import torch_distributed

GPU = torch.device("cuda", 0)


class StandInEvent:
    """As ``torch.cuda.Event``, of the stand-in's driver."""

    def __init__(self, gpu: StandInGpu) -> None:
        self._library = gpu.library
        self.handle = ctypes.c_void_p()
        self._library.cuCtxPushCurrent_v2(ctypes.c_void_p(1))
        assert self._library.cuEventCreate(ctypes.byref(self.handle), 2) == 0
        self._library.cuCtxPopCurrent_v2(None)
        assert self._library.cuEventRecord(self.handle, ctypes.c_void_p(gpu.stream)) == 0

    def query(self) -> bool:
        return bool(self._library.cuEventQuery(self.handle) == 0)


class StandInStreams:
    """What :class:`pycomm.torch_backend.device_work.CudaStreams` is on a GPU."""

    def __init__(self, gpu: StandInGpu) -> None:
        self.devices: list[torch.device] = []
        self._gpu = gpu

    def mark(self) -> StandInEvent:
        return StandInEvent(self._gpu)

    def follow(self, mark: StandInEvent) -> None:
        assert self._gpu.library.cuStreamWaitEvent(ctypes.c_void_p(self._gpu.stream), mark.handle, 0) == 0


@contextlib.contextmanager
def for_cuda_tensors(gpu: StandInGpu) -> Iterator[StandInGpu]:
    """Process groups take CPU tensors for tensors of ``gpu``."""
    copy = tensors._copy

    def copy_in_its_turn(target: torch.Tensor, contents: torch.Tensor) -> None:
        gpu.synchronize()
        copy(target, contents)

    with (
        patch.object(Communicators, "of", lambda self, tensor: self.on(GPU)),
        patch("pycomm.torch_backend.process_group.CudaStreams", lambda device: StandInStreams(gpu)),
        patch("pycomm.torch_backend.tensors._copy", copy_in_its_turn),
    ):
        yield gpu


def run(pool: Pool, size: int, standin: Path, folder: Path, body: Callable[..., Any], *args: Any) -> list[Any]:
    """``body(gpu, *args)`` on persistent ranks, inside an initialised torch.distributed."""
    folder.mkdir(exist_ok=True)
    return pool.run(size, _within, str(standin), str(folder), body, args)


def _within(host: Communicator, path: str, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    with (
        standing_in(path, folder) as gpu,
        for_cuda_tensors(gpu),
        torch_distributed(host, "pycomm", f"{folder}/torch-store"),
    ):
        return body(gpu, *args)
