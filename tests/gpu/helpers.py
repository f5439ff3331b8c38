"""NumPy's elements on the GPU and back; a bfloat16 is its bits there (tests/host/reduce_reference.py)."""

from __future__ import annotations

import numpy as np
import torch

from tests.host.reduce_reference import STORAGE, Raw

KERNEL_TIMEOUT_S = 30.0  # of waits that should end at once


def to_gpu(dtype: str, raw: Raw) -> torch.Tensor:
    """A tensor of its own on the current GPU."""
    if raw.size == 0:
        return torch.empty(0, dtype=getattr(torch, dtype), device="cuda")
    plain = torch.from_numpy(np.ascontiguousarray(raw).view(np.uint8).copy()).cuda()
    return plain.view(getattr(torch, dtype))


def from_gpu(dtype: str, tensor: torch.Tensor) -> Raw:
    plain = tensor.detach().contiguous().view(torch.uint8).cpu().numpy()
    return plain.view(STORAGE[dtype])
