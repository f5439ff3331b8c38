"""Tensors of the cases: values that every rank can compute, in every kind of memory, with guard bytes around them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pycomm import Communicator
from tests.host.reduce_reference import INTEGERS, STORAGE, Raw, narrow

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTS = tuple(INTEGERS)
NUM_VALUES = 1 << 18
GUARD = 0xA5
TAIL_BYTES = 64


def storage(dtype: str) -> type[np.generic]:
    return np.bool_ if dtype == "bool" else STORAGE[dtype]


@functools.cache
def _well(dtype: str) -> Raw:
    """[NUM_VALUES]. Floats: random bits, so NaN, infinities and subnormals are among them; in every second place
    normal ones of many magnitudes, so that the order of additions shows in the bits."""
    rng = np.random.default_rng(7)
    if dtype == "bool":
        raw = rng.integers(0, 2, NUM_VALUES).astype(np.bool_)
    else:
        raw = np.frombuffer(rng.bytes(NUM_VALUES * np.dtype(STORAGE[dtype]).itemsize), STORAGE[dtype]).copy()
    if dtype in FLOATS:
        magnitudes = 10.0 ** rng.integers(-3, 4, NUM_VALUES // 2)
        normal = rng.standard_normal(NUM_VALUES // 2) * magnitudes
        raw[::2] = narrow(dtype, normal.astype(np.float64 if dtype == "float64" else np.float32))
    raw.flags.writeable = False
    return raw


def values(dtype: str, count: int, seed: int) -> Raw:
    """[count], as ``dtype`` is stored (bfloat16 as its bits); read-only."""
    well = _well(dtype)
    start = seed * 2_654_435_761 % (NUM_VALUES // 2)
    return well[start : start + count] if start + count <= NUM_VALUES else np.resize(well[start:], count)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


class Arena:
    """Symmetric memory of a rank for blocks, given out from front to back."""

    def __init__(self, comm: Communicator, num_bytes: int) -> None:
        self._bytes = comm.empty(num_bytes, dtype=torch.uint8)
        self.used_bytes = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        begin, end = self.used_bytes, self.used_bytes + num_bytes
        assert end <= self._bytes.numel(), "the arena is full"
        self.used_bytes = (end + 7) // 8 * 8  # multiples of the largest element, no better
        return self._bytes[begin:end]


@dataclass(frozen=True)
class Block:
    """One tensor of a call in its memory.

    Attributes:
        memory: uint8: ``lead`` guard bytes, the elements, TAIL_BYTES guard bytes.
        as_numpy: handed to calls as a NumPy array, which they take through DLPack.
    """

    memory: torch.Tensor
    lead: int
    dtype: str
    as_numpy: bool

    @classmethod
    def of(cls, raw: Raw, dtype: str, *, arena: Arena | None, as_numpy: bool = False, offset: int = 0) -> Block:
        """A copy of ``raw``, in symmetric memory where there is an arena, ``offset`` elements behind its start."""
        lead = offset * raw.itemsize
        size = lead + raw.nbytes + TAIL_BYTES
        memory = torch.empty(size, dtype=torch.uint8) if arena is None else arena.take(size)
        block = cls(memory, lead, dtype, as_numpy and dtype != "bfloat16")  # NumPy has no bfloat16
        memory.numpy()[:] = GUARD
        block.raw()[:] = raw
        return block

    def raw(self) -> Raw:
        return self.memory.numpy()[self.lead : len(self.memory) - TAIL_BYTES].view(storage(self.dtype))

    def part(self, start: int, count: int) -> Any:
        """What a call gets: a tensor, or an array, of these elements."""
        raw = self.raw()[start : start + count]
        if self.as_numpy:
            return raw
        elements = self.memory[self.lead : len(self.memory) - TAIL_BYTES].view(getattr(torch, self.dtype))
        return elements[start : start + count]

    def whole(self) -> Any:
        return self.part(0, len(self.raw()))

    def difference(self, expected: Raw) -> str:
        """Empty if every bit is as expected and nothing around the elements was touched."""
        memory = self.memory.numpy()
        if (memory[: self.lead] != GUARD).any() or (memory[len(memory) - TAIL_BYTES :] != GUARD).any():
            return "bytes around the tensor were written"
        found, wanted = self.raw().view(np.uint8), np.ascontiguousarray(expected).view(np.uint8)
        if np.array_equal(found, wanted):
            return ""
        first = int(np.argmax(found != wanted)) // expected.itemsize
        return f"element {first} of {len(expected)} is {self.raw()[first]!r}, not {expected[first]!r}"
