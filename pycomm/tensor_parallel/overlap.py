"""Matrix products with their communication in one operator: the building blocks of tensor-parallel layers.

==========================  ==========================================  =====================================
operator                    forward                                     backward
==========================  ==========================================  =====================================
``all_gather_matmul``       cat(x over ranks) @ weight.T                matmul + reduce_scatter for x
``matmul_reduce_scatter``   sum over ranks of x @ weight.T, own rows    all_gather + matmul for x
``matmul_all_reduce``       sum over ranks of x @ weight.T              no communication
``copy_matmul``             x @ weight.T                                matmul + all_reduce for x
==========================  ==========================================  =====================================

Each takes a bias, which is added once. Under autocast they multiply, and communicate, in its dtype. The weight's
gradient is computed while the gradient of x is under way. ``overlap=False`` runs the same pieces in the
same order, one after the other: the bits are the same. Autograd saves this rank's x and weight, never gathered ones.
Double backward is not there: it raises.

Refs: "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism" (2019); "Reducing
Activation Recomputation in Large Transformer Models" (2022) for the sequence-parallel pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.tensor_parallel import fused_operators as operators
from pycomm.tensor_parallel.groups import group_name

__all__ = ["all_gather_matmul", "copy_matmul", "matmul_all_reduce", "matmul_reduce_scatter"]


def all_gather_matmul(
    x: Tensor,
    weight: Tensor,
    comm: Communicator,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
    overlap: bool = True,
) -> Tensor:
    """``cat(x over ranks) @ weight.T + bias``. Collective, in forward and in backward.

    Args:
        x: [s, K], this rank's rows, or […, s, K], sharded on dim −2. Ranks may have different s, also 0.
        weight: [N, K], usually this rank's shard; ``bias``: [N].
        sizes: s of every rank; None: found out. Under torch.compile None means that all are equal.
        overlap: multiply own rows before waiting for the peers'; in backward, the weight's gradient too.

    Returns:
        [S, N] or […, S, N], S being the sum over ranks of s.

    Raises:
        ValueError: shapes do not fit, or ``sizes`` is not what the ranks have.
        MismatchError: another rank called something else, or with another K or dtype.
    """
    x, weight, bias = _checked(x, weight, bias)
    if sizes is None and torch.compiler.is_compiling():
        sizes = [x.shape[-2]] * comm.world_size
    out: Tensor = operators.all_gather_matmul_op(x, weight, bias, sizes, group_name(comm), overlap)
    return out


def matmul_reduce_scatter(
    x: Tensor, weight: Tensor, comm: Communicator, bias: Tensor | None = None, *, overlap: bool = True
) -> Tensor:
    """``x @ weight.T`` summed over ranks, ``+ bias``: this rank's rows. Collective, in forward and in backward.

    Args:
        x: [S, K] or […, S, K]; S is the same on all ranks, K may differ.
        weight: [N, K].
        bias: [N], the same on every rank and added once; its gradient is that of all rows, on every rank.

    Returns:
        [s, N] or […, s, N], s being this rank's part of S by the rule of ``torch.chunk``. Summed in rank order, 16-bit
        floats in fp32.

    Raises:
        ValueError, MismatchError: as :func:`all_gather_matmul`.
    """
    x, weight, bias = _checked(x, weight, bias)
    out: Tensor = operators.matmul_reduce_scatter_op(x, weight, bias, group_name(comm), overlap)
    return out


def matmul_all_reduce(
    x: Tensor, weight: Tensor, comm: Communicator, bias: Tensor | None = None, *, overlap: bool = True
) -> Tensor:
    """``x @ weight.T`` summed over ranks, ``+ bias``, on every rank. Collective in forward.

    Args:
        x: […, K]; the leading dimensions are the same on all ranks, K may differ.
        weight: [N, K].
        bias: [N], the same on every rank and added once.

    Returns:
        […, N]; the same bits on every rank. The gradient that comes back is taken to be the same on every rank, too.

    Raises:
        ValueError, MismatchError: as :func:`all_gather_matmul`.
    """
    x, weight, bias = _checked(x, weight, bias)
    out: Tensor = operators.matmul_all_reduce_op(x, weight, bias, group_name(comm), overlap)
    return out


def copy_matmul(
    x: Tensor, weight: Tensor, comm: Communicator, bias: Tensor | None = None, *, overlap: bool = True
) -> Tensor:
    """``x @ weight.T + bias`` of an x that all ranks have. Collective in backward, which sums x's gradient over ranks.

    Args:
        x: […, K], the same on every rank.
        weight: [N, K]; ``bias``: [N]; N may differ between ranks.
    """
    x, weight, bias = _checked(x, weight, bias)
    out: Tensor = operators.copy_matmul_op(x, weight, bias, group_name(comm), overlap)
    return out


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three, in autocast's dtype where that is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point():
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}: "
            f"it takes […, K] and [N, K] of one dtype"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias {tuple(bias.shape)} {bias.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}: "
            f"it takes [N] of the same dtype"
        )
    return x, weight, bias
