"""The CUDA kernels of several virtual ranks, run on the CPU; see cuda_on_cpu.hpp and kernels_api.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.host.reduce_reference import STORAGE, Raw

DTYPES = {name: code for code, name in enumerate(STORAGE)}  # csrc/include/pycomm/types.hpp
OPS = {"sum": 0, "avg": 1, "min": 2, "max": 3, "prod": 4}
CHUNK = 1024
LONG_NS = 10**15  # of a clock that advances a microsecond a look
GUARD_BYTES = 64

Address = ctypes.c_void_p


class Layout(ctypes.Structure):
    _fields_ = [
        ("segments", Address),
        ("num_segments", ctypes.c_int),
        ("chunk_elements", ctypes.c_int),
        ("num_chunks", ctypes.c_int64),
        ("num_elements", ctypes.c_int64),
    ]


class Where(ctypes.Structure):
    _fields_ = [
        ("world", Address),
        ("rank", ctypes.c_int),
        ("num_blocks", ctypes.c_int),
        ("num_threads", ctypes.c_int),
    ]


class Status(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("expected", ctypes.c_uint32),
        ("seen", ctypes.c_uint32),
    ]


class ClipResult(ctypes.Structure):
    _fields_ = [("norm", ctypes.c_float), ("scale", ctypes.c_float), ("skip", ctypes.c_uint32)]


class AdamWOptions(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")]


def flat_layout(num_elements: int, chunk: int = CHUNK) -> Layout:
    return Layout(None, 0, chunk, -(-num_elements // chunk), num_elements)


@dataclass
class Segments:
    """A bucket's parameters: ``counts`` elements each, ``gap`` elements apart, with their tensors' addresses."""

    counts: Sequence[int]
    gap: int = 0
    tensors: Sequence[int] = ()
    table: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rows, first, chunk = [], 0, 0
        for index, count in enumerate(self.counts):
            rows.append([first, count, chunk, self.tensors[index] if self.tensors else 0])
            first += count + self.gap
            chunk += -(-count // CHUNK)
        self.table = np.array(rows, np.int64).reshape(-1, 4)
        self.num_elements, self.num_chunks = first, chunk

    def layout(self) -> Layout:
        return Layout(self.table.ctypes.data, len(self.counts), CHUNK, self.num_chunks, self.num_elements)


class Memory:
    """Elements ``shift`` elements behind a 16-byte boundary, between guard bytes that nobody may touch."""

    def __init__(self, raw: Raw, shift: int = 0) -> None:
        self._bytes = np.full(raw.nbytes + 2 * GUARD_BYTES + 256, 0xA5, np.uint8)
        start = GUARD_BYTES + -(self._bytes.ctypes.data + GUARD_BYTES) % 16 + shift * raw.itemsize
        self._start, self._end = start, start + raw.nbytes
        self.elements = self._bytes[start : self._end].view(raw.dtype)
        self.elements[:] = raw

    @property
    def address(self) -> int:
        return self.elements.ctypes.data if self.elements.size else self._bytes.ctypes.data + self._start

    def at(self, element: int) -> int:
        return self.address + element * self.elements.itemsize

    def assert_guards_intact(self) -> None:
        assert np.all(self._bytes[: self._start] == 0xA5)
        assert np.all(self._bytes[self._end :] == 0xA5)


def pointers(addresses: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (Address * len(addresses))(*addresses)


class Ranks:
    """``num_ranks`` virtual ranks; each method queues one rank's kernel, :meth:`run` runs what is queued."""

    def __init__(self, library: ctypes.CDLL, num_ranks: int, timeout_ns: int = LONG_NS) -> None:
        self._library = library
        self.num_ranks = num_ranks
        self._world = Address(library.world_new(num_ranks, ctypes.c_uint64(timeout_ns)))
        self.blocks, self.threads = 2, 64
        self._kept: list[object] = []

    def close(self) -> None:
        self._library.world_free(self._world)

    def run(self, seed: int) -> None:
        self._library.world_run(ctypes.c_uint32(seed))
        self._kept.clear()

    def keep(self, *memory: object) -> None:
        """Until the queued kernels have run: they know addresses only."""
        self._kept.extend(memory)

    def status(self, rank: int) -> Status:
        return Status.from_address(self._library.world_status(self._world, rank))

    def abort(self, rank: int) -> None:
        self._library.world_abort(self._world, rank)

    def start_at(self, epoch: int) -> None:
        self._library.world_start_at(self._world, ctypes.c_uint32(epoch))

    def where(self, rank: int) -> Where:
        return Where(self._world, rank, self.blocks, self.threads)

    def staging_bytes(self, layout: Layout, wire: str) -> int:
        return int(self._library.staging_bytes(ctypes.byref(self.where(0)), ctypes.byref(layout), DTYPES[wire]))

    def launch(self, name: str, rank: int, *args: object) -> None:
        """Queue a kernel of kernels_api.cpp. Raises ValueError: its launcher refused."""
        message = getattr(self._library, name)(ctypes.byref(self.where(rank)), *args)
        if message is not None:
            raise ValueError(message.decode())


def load(folder: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(folder / "libcuda_on_cpu.so"))
    for name in ("world_new", "world_status"):
        getattr(library, name).restype = Address
    library.matmul_new.restype = library.matmul_gathered.restype = Address
    library.staging_bytes.restype = library.matmul_run.restype = ctypes.c_size_t
    for name in ("all_reduce_one_shot", "all_reduce_two_shot", "reduce_scatter", "all_gather", "put", "get", "bucket"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("norm", "sharded_adamw", "broken_group", "matmul_enqueue", "matmul_wait"):
        getattr(library, name).restype = ctypes.c_char_p
    return library
