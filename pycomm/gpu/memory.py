"""Symmetric memory of GPUs as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from pycomm import _C

__all__ = ["dtype_name", "tensors_of"]


class _Part:
    """One rank's part, as ``torch.as_tensor`` takes it: the tensor keeps this object, and so the memory."""

    def __init__(self, memory: _C.GpuMemory, rank: int) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.bytes,),
            "typestr": "|u1",
            "data": (memory.part(rank), False),
            "version": 3,
        }


def tensors_of(
    memory: _C.GpuMemory, device: torch.device, shape: Sequence[int], dtype: torch.dtype, offset: int = 0
) -> list[Tensor]:
    """Every rank's part, by rank, from byte ``offset`` on, as tensors of ``shape``."""
    end = offset + prod(shape) * dtype.itemsize
    parts = (torch.as_tensor(_Part(memory, rank), device=device) for rank in range(memory.world_size))
    return [part[offset:end].view(dtype).view(*shape) for part in parts]


def dtype_name(dtype: torch.dtype) -> str:
    """As the extension calls it."""
    return str(dtype).removeprefix("torch.")
