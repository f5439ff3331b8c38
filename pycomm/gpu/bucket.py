"""A bucket: parameters that lie in flat memory one after the other, with the table that kernels find them by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pycomm.gpu.grids import CHUNK_ELEMENTS

__all__ = ["Bucket"]


class Bucket:
    """``tensors`` and their places in ``memory``, in order and without gaps.

    Args:
        tensors: contiguous, of one dtype (float32, float16 or bfloat16), on one GPU. They are kept alive.
        dtype: of the bucket's memory.
    """

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        if not tensors:
            raise ValueError("a bucket needs at least one tensor")
        first = tensors[0]
        for tensor in tensors:
            if tensor.dtype != first.dtype or tensor.device != first.device or not tensor.is_contiguous():
                raise ValueError(
                    f"a bucket's tensors are contiguous and of one dtype and device, not {tensor.dtype} on "
                    f"{tensor.device} beside {first.dtype} on {first.device}"
                )
        rows, element, chunk = [], 0, 0
        for tensor in tensors:
            rows.append([element, tensor.numel(), chunk, tensor.data_ptr()])
            element += tensor.numel()
            chunk += -(-tensor.numel() // CHUNK_ELEMENTS)
        self.tensors = list(tensors)
        self.num_chunks = chunk
        self.memory = torch.empty(element, dtype=dtype, device=first.device)
        self.squares = torch.empty(chunk, dtype=torch.float64, device=first.device)
        self.non_finite = torch.zeros(1, dtype=torch.int32, device=first.device)
        self._table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(first.device)  # Segment of layout.hpp

    @property
    def table(self) -> tuple[int, int, int, int]:
        """For :class:`pycomm._C.RankGroup`: address, number of segments, of chunks, of elements."""
        return self._table.data_ptr(), len(self.tensors), self.num_chunks, self.memory.numel()
