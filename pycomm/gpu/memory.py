"""Symmetric memory of GPUs as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from pycomm import _C

__all__ = ["tensor_at", "tensors_of"]


def tensor_at(address: int, num_bytes: int, device: torch.device, owner: object) -> Tensor:
    """Memory that ``device`` maps, on whatever GPU it lies, as uint8 [num_bytes] on ``device``. It keeps ``owner``."""
    index = -1 if device.type == "cpu" else device.index
    return torch.from_dlpack(_C.dlpack(address, num_bytes, index, owner))


def tensors_of(
    memory: _C.GpuMemory, device: torch.device, shape: Sequence[int], dtype: torch.dtype, offset: int = 0
) -> list[Tensor]:
    """Every rank's part, by rank, from byte ``offset`` on, as tensors of ``shape`` that keep ``memory``.

    All are tensors on ``device``, which maps them, whichever GPU they lie on.
    """
    end = offset + prod(shape) * dtype.itemsize
    parts = (tensor_at(memory.part(rank), memory.bytes, device, memory) for rank in range(memory.world_size))
    return [part[offset:end].view(dtype).view(*shape) for part in parts]
