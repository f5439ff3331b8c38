"""Squared norms of gradients, block by block.

Each block's sum is fp64, and they are added in (parameter, block) order, so a norm has the same bits whatever the
buckets, the shards and the number of passes that it took (docs/determinism.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pycomm import _C
from pycomm.data_parallel.bucket import Slot, dense_strides
from pycomm.data_parallel.shards import Row, num_blocks
from pycomm.fused import dtype_name


def check_on_host(what: str, tensors: Iterable[tuple[str, Tensor]], instead: str) -> None:
    """Raise NotImplementedError for what is not on the CPU: the passes over gradients read memory by its address.

    Args:
        what: needs them there.
        tensors: each with what the error calls it.
        instead: what works on other devices.
    """
    for name, tensor in tensors:
        if tensor.device.type != "cpu":
            raise NotImplementedError(
                f"{what} works on the CPU alone as yet, and {name} is on {tensor.device}; {instead}"
            )


def total_norm(table: Tensor) -> float:
    """The norm of all gradients whose blocks are in ``table`` [num_blocks], float64."""
    return float(_C.sum_in_order(table.data_ptr(), table.numel()) ** 0.5)


def norms_of_runs(values: Tensor, rows: Sequence[Row], table: Tensor, *, packed: bool) -> None:
    """Fill ``table`` for runs of ``values``, at their packed or at their gradient's position."""
    _C.block_norms(values.data_ptr(), dtype_name(values.dtype), _C.Runs(rows), packed, table.data_ptr())


def norms_of_tensor(grad: Tensor, first_block: int, table: Tensor) -> None:
    """Fill ``table`` for one gradient of any layout."""
    if grad.layout != torch.strided:
        raise ValueError("the norm of a sparse gradient is not defined here; build its layer with sparse=False")
    dense = grad
    if grad.stride() != dense_strides(grad):  # norm blocks are cut in the order of memory, without gaps
        dense = torch.empty_strided(grad.shape, dense_strides(grad), dtype=grad.dtype, device=grad.device).copy_(grad)
    norms_of_runs(dense, [(0, 0, 0, grad.numel(), first_block, 0)], table, packed=False)


def non_finite_names(slots: Sequence[Slot], table: Tensor) -> list[str]:
    """The parameters whose gradients have an infinity or a NaN."""
    bad = torch.nonzero(~torch.isfinite(table)).flatten().tolist()
    return [
        slot.name
        for slot in slots
        if any(slot.first_block <= block < slot.first_block + num_blocks(slot.param.numel()) for block in bad)
    ]
