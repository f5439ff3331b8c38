"""Symmetric memory of GPUs as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from pycomm import _C

__all__ = ["dtype_name", "tensors_of"]


def tensors_of(
    memory: _C.GpuMemory, device: torch.device, shape: Sequence[int], dtype: torch.dtype, offset: int = 0
) -> list[Tensor]:
    """Every rank's part, by rank, from byte ``offset`` on, as tensors of ``shape`` that keep ``memory``.

    All are tensors on ``device``, which maps them, whichever GPU they lie on.
    """
    end = offset + prod(shape) * dtype.itemsize
    index = -1 if device.type == "cpu" else device.index
    parts = (torch.from_dlpack(memory.dlpack(rank, index)) for rank in range(memory.world_size))
    return [part[offset:end].view(dtype).view(*shape) for part in parts]


def dtype_name(dtype: torch.dtype) -> str:
    """As the extension calls it."""
    return str(dtype).removeprefix("torch.")
