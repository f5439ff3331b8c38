"""What :class:`pycomm.backends.nccl.gpu.Gpu` has of memory that ranks map, and of kernels, over the host's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pycomm import _C
from pycomm.errors import BackendUnavailableError
from pycomm.gpu.memory import tensors_of

TYPES = {"int8": 0, "uint8": 1, "int32": 2, "int64": 4, "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3, "avg": 4}
STAGING_AT = 64  # standin/kernels.cpp


class HostMemory:
    """What :class:`pycomm._C.GpuMemory` is: every rank's part, of ``keep``'s memory."""

    def __init__(self, parts: Sequence[int], num_bytes: int, keep: Any) -> None:
        self._parts, self.bytes, self.world_size, self._keep = parts, num_bytes, len(parts), keep

    def part(self, rank: int) -> int:
        return self._parts[rank]


class HostKernels:
    """What :class:`pycomm.backends.nccl.kernels.Kernels` is, on streams of the stand-in."""

    def __init__(self, library: ctypes.CDLL, memory: HostMemory, rank: int, timeout_s: float) -> None:
        self._library, self._memory, self._rank, self._timeout_ms = library, memory, rank, int(timeout_s * 1000)
        self._status = torch.zeros(5, dtype=torch.int32)
        self.abort_word = memory.part(rank) + 4
        self.status = self._status.data_ptr()
        self.launched: list[str] = []
        self.refuses = False

    def launch(self, kernel: str, data: Sequence[int], count: int, dtype: str, op: str, stream: int) -> None:
        if self.refuses:
            raise ValueError(f"{kernel}: no such grid")
        self.launched.append(kernel)
        size = self._memory.world_size
        parts = (ctypes.c_void_p * size)(*(self._memory.part(rank) for rank in range(size)))
        tensors = (ctypes.c_void_p * len(data))(*data)
        self._library.standin_all_reduce(
            ctypes.c_void_p(stream),
            parts,
            self._rank,
            size,
            tensors,
            int(kernel == "one_shot"),
            ctypes.c_size_t(count),
            TYPES[dtype],
            OPS[op],
            ctypes.c_void_p(self.status),
            self._timeout_ms,
        )


class KernelMemory:
    """See the module.

    Attributes:
        obstacle: why there are no kernels here.
        budget_bytes: an allocation above it fails here; None: none does.
        name: of the GPU.
        unreachable: the name of a GPU that this one cannot access.
        kernel_timeout_s: of kernels' waits; None: the communicator's.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.obstacle = "the stand-in was asked for no kernels"
        self.budget_bytes: int | None = None
        self.kernel_timeout_s: float | None = None
        self.name = "a GPU"
        self.unreachable: str | None = None
        self._library = library

    def kernel_obstacle(self) -> str:
        return self.obstacle

    def num_multiprocessors(self) -> int:
        return 132

    def uuid(self) -> str:
        return self.name

    def check_reaches(self, uuids: Sequence[str]) -> None:
        if self.unreachable in uuids:
            raise BackendUnavailableError(f"{self.name} cannot access the memory of {self.unreachable}")

    def kernel_memory_bytes(self, one_shot_bytes: int, num_multiprocessors: int) -> int:
        return STAGING_AT + one_shot_bytes

    def shared_memory(self, host: _C.HostCommunicator, num_bytes: int, timeout_s: float) -> HostMemory:
        buffer = np.frombuffer(host.empty(num_bytes, timeout_s), dtype=np.uint8)
        if self.budget_bytes is not None and num_bytes > self.budget_bytes:
            raise MemoryError(f"{num_bytes} bytes are too many")
        buffer[:] = 0
        address = buffer.ctypes.data
        peers = [np.frombuffer(host.peer(address, num_bytes, rank), dtype=np.uint8) for rank in range(host.world_size)]
        return HostMemory([peer.ctypes.data for peer in peers], num_bytes, (buffer, peers))

    def window_memory(self, window: _C.NcclWindow) -> HostMemory:
        return HostMemory(window.parts, window.bytes, window)

    def kernels(self, memory: HostMemory, rank: int, num_multiprocessors: int, timeout_s: float) -> HostKernels:
        return HostKernels(self._library, memory, rank, self.kernel_timeout_s or timeout_s)

    def tensors(self, memory: HostMemory, shape: Sequence[int], dtype: torch.dtype, offset: int) -> list[torch.Tensor]:
        return tensors_of(memory, torch.device("cpu"), shape, dtype, offset)  # type: ignore[arg-type]
