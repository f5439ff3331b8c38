"""Symmetric memory of a group whose ranks map each other's GPUs, and which calls pycomm's own kernels do there.

Small all-reduces take one step, whatever memory they are in; middle ones two, in symmetric memory; the rest is NCCL's.
What a rank chooses depends on the call, on the thresholds, which are rank 0's, and on where its own tensor lies. The
last is the same on all ranks in a right program, and is logged with the call, so that a difference is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from pycomm import _C
from pycomm.backends.nccl.thresholds import IN_SYMMETRIC, Thresholds

__all__ = ["AllReduceKernel", "Symmetric"]


class AllReduceKernel(Protocol):
    """:class:`pycomm.backends.nccl.kernels.Kernels`."""

    abort_word: int
    status: int

    def launch(self, kernel: str, data: Sequence[int], count: int, dtype: str, op: str, stream: int) -> None: ...


class Symmetric:
    """See the module.

    Args:
        tensors: every rank's part of a memory from a byte on, as tensors of a shape and dtype.
    """

    def __init__(
        self,
        rank: int,
        kernels: AllReduceKernel,
        thresholds: Thresholds,
        tensors: Callable[[_C.GpuMemory, Sequence[int], torch.dtype, int], list[torch.Tensor]],
    ) -> None:
        self._rank = rank
        self._kernels = kernels
        self._thresholds = thresholds
        self._tensors = tensors
        # By number, from 1: allocations are collective. A tensor keeps its memory.
        self._memories: WeakValueDictionary[int, _C.GpuMemory] = WeakValueDictionary()
        self._num_memories = 0

    def add(self, memory: _C.GpuMemory, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """This rank's part of new memory."""
        self._num_memories += 1
        self._memories[self._num_memories] = memory
        return self._tensors(memory, shape, dtype, 0)[self._rank]

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's part of ``tensor``.

        Raises:
            ValueError: it is not symmetric.
        """
        place = self._place(tensor.data_ptr(), tensor.nbytes)
        if place is None:
            raise ValueError("peers: the tensor is not in symmetric memory: make it with comm.empty()")
        _, memory, offset = place
        return self._tensors(memory, tensor.shape, tensor.dtype, offset)

    def all_reduce(self, call: _C.Call, num_bytes: int) -> tuple[_C.Call, Callable[[int], None]] | None:
        """The call by a kernel, and what launches it on a stream; None: NCCL's."""
        kernel = self._thresholds.route(num_bytes, symmetric=True) if num_bytes else "nccl"
        number = offset = 0
        parts = [call.output]
        if kernel in IN_SYMMETRIC:
            place = self._place(call.output, num_bytes)
            if place is None:
                kernel = self._thresholds.route(num_bytes, symmetric=False)
            else:
                number, memory, offset = place
                parts = [memory.part(rank) + offset for rank in range(memory.world_size)]
        if kernel == "nccl":
            return None
        launch = partial(self._kernels.launch, kernel, parts, call.count, call.dtype, call.op)
        return call.by_kernel(kernel, number, offset), launch

    def _place(self, data: int, num_bytes: int) -> tuple[int, _C.GpuMemory, int] | None:
        """Number and memory of an allocation that has these bytes, and how far into it they begin."""
        for number, memory in list(self._memories.items()):
            offset = data - memory.part(self._rank)
            if offset >= 0 and offset + num_bytes <= memory.bytes:
                return number, memory, offset
        return None
