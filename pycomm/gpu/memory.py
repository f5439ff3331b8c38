"""Symmetric memory of GPUs as torch tensors, and where NVIDIA's libraries lie."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pycomm import _C

__all__ = ["in_wheels", "tensor_at", "tensors_of"]


def in_wheels(folder: str, name: str) -> Iterator[str]:
    """The files ``lib/name`` of NVIDIA's Python packages in ``folder``; none where they are not installed."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(root) / folder / "lib" / name
        if path.is_file():
            yield str(path)


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
