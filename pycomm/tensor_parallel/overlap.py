"""Matrix products with their communication in one operator: the building blocks of tensor-parallel layers.

==========================  ==========================================  =====================================
operator                    forward                                     backward
==========================  ==========================================  =====================================
``all_gather_matmul``       cat(x over ranks) @ weight.T                matmul + reduce_scatter for x
``matmul_reduce_scatter``   sum over ranks of x @ weight.T, own rows    all_gather + matmul for x
``matmul_all_reduce``       sum over ranks of x @ weight.T              no communication
``copy_matmul``             x @ weight.T + bias                         matmul + all_reduce for x
==========================  ==========================================  =====================================

The weight's gradient is computed while the gradient of x is under way. ``overlap=False`` runs the same pieces in the
same order, one after the other: the bits are the same. Autograd saves this rank's x and weight, never gathered ones.
Double backward is not there: it raises.

Refs: "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism" (2019); "Reducing
Activation Recomputation in Large Transformer Models" (2022) for the sequence-parallel pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.tensor_parallel import fused_any, fused_host
from pycomm.tensor_parallel.groups import communicator, group_name
from pycomm.tensor_parallel.operators import define
from pycomm.tensor_parallel.products import Visit, accumulate, as_3d, multiply
from pycomm.tensor_parallel.shards import shard_sizes

__all__ = ["all_gather_matmul", "copy_matmul", "matmul_all_reduce", "matmul_reduce_scatter"]


def all_gather_matmul(
    x: Tensor, weight: Tensor, comm: Communicator, *, sizes: Sequence[int] | None = None, overlap: bool = True
) -> Tensor:
    """``cat(x over ranks) @ weight.T``. Collective, in forward and in backward.

    Args:
        x: [s, K], this rank's rows, or […, s, K], sharded on dim −2. Ranks may have different s, also 0.
        weight: [N, K], usually this rank's shard.
        sizes: s of every rank; None: found out. Under torch.compile None means that all are equal.
        overlap: multiply own rows before waiting for the peers'; in backward, the weight's gradient too.

    Returns:
        [S, N] or […, S, N], S being the sum over ranks of s.

    Raises:
        ValueError: shapes do not fit, or ``sizes`` is not what the ranks have.
        MismatchError: another rank called something else, or with another K or dtype.
    """
    _check(x, weight)
    if sizes is None and torch.compiler.is_compiling():
        sizes = [x.shape[-2]] * comm.world_size
    out: Tensor = _all_gather_matmul(x, weight, sizes, group_name(comm), overlap)
    return out


def matmul_reduce_scatter(x: Tensor, weight: Tensor, comm: Communicator, *, overlap: bool = True) -> Tensor:
    """``x @ weight.T`` summed over ranks: this rank's rows. Collective, in forward and in backward.

    Args:
        x: [S, K] or […, S, K]; S is the same on all ranks, K may differ.
        weight: [N, K].

    Returns:
        [s, N] or […, s, N], s being this rank's part of S by the rule of ``torch.chunk``. Summed in rank order, 16-bit
        floats in fp32.

    Raises:
        ValueError, MismatchError: as :func:`all_gather_matmul`.
    """
    _check(x, weight)
    out: Tensor = _matmul_reduce_scatter(x, weight, group_name(comm), overlap)
    return out


def matmul_all_reduce(x: Tensor, weight: Tensor, comm: Communicator, *, overlap: bool = True) -> Tensor:
    """``x @ weight.T`` summed over ranks, on every rank. Collective in forward.

    Args:
        x: […, K]; the leading dimensions are the same on all ranks, K may differ.
        weight: [N, K].

    Returns:
        […, N]; the same bits on every rank. The gradient that comes back is taken to be the same on every rank, too.

    Raises:
        ValueError, MismatchError: as :func:`all_gather_matmul`.
    """
    _check(x, weight)
    out: Tensor = _matmul_all_reduce(x, weight, group_name(comm), overlap)
    return out


def copy_matmul(
    x: Tensor, weight: Tensor, comm: Communicator, bias: Tensor | None = None, *, overlap: bool = True
) -> Tensor:
    """``x @ weight.T + bias`` of an x that all ranks have. Collective in backward, which sums x's gradient over ranks.

    Args:
        x: […, K], the same on every rank.
        weight: [N, K]; ``bias``: [N]; N may differ between ranks.
    """
    _check(x, weight)
    out: Tensor = _copy_matmul(x, weight, bias, group_name(comm), overlap)
    return out


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}: "
            f"it takes […, K] and [N, K] of one dtype"
        )


def _fused(comm: Communicator) -> ModuleType:
    return fused_host if comm.backend == "shm" and comm.world_size > 1 else fused_any


def _product_of_shards(out: list[Tensor], x: Tensor, weight_t: Tensor) -> Any:
    """For ``gather``: a visitor that puts ``shard @ weight_t`` of all shards into one tensor, left in ``out``."""

    def start(sizes: Sequence[int]) -> Visit:
        whole = x.new_empty(x.shape[0], sum(sizes), weight_t.shape[1])
        out[:] = [whole]

        def visit(rank: int, row: int, shard: Tensor) -> None:
            multiply(shard, weight_t, whole[:, row : row + shard.shape[1]])

        return visit

    return start


# all_gather_matmul


def _all_gather_matmul_impl(x: Tensor, weight: Tensor, sizes: Any, group: str, overlap: bool) -> Tensor:
    comm = communicator(group)
    shard = as_3d(x)
    out: list[Tensor] = []
    _fused(comm).gather(comm, shard, sizes, overlap, _product_of_shards(out, shard, weight.t()))
    return out[0].view(*x.shape[:-2], *out[0].shape[1:])


def _all_gather_matmul_fake(x: Tensor, weight: Tensor, sizes: Any, group: str, overlap: bool) -> Tensor:
    rows = sum(sizes) if sizes is not None else x.shape[-2] * communicator(group).world_size
    return x.new_empty(*x.shape[:-2], rows, weight.shape[0])


def _all_gather_matmul_backward_impl(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Any, group: str, overlap: bool, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    comm = communicator(group)
    fused, shard, grad_3d = _fused(comm), as_3d(x), as_3d(grad)
    if not need_weight:
        grad_x = fused.reduce_scatter(comm, grad_3d, weight, overlap)
        return grad_x.view(x.shape), weight.new_empty(0)
    grad_weight = torch.empty_like(weight)
    found: list[Tensor] = []

    def start(sizes: Sequence[int]) -> Visit:
        visited: list[int] = []

        def visit(rank: int, row: int, shard: Tensor) -> None:
            accumulate(grad_3d[:, row : row + shard.shape[1]], shard, grad_weight, first=not visited)
            visited.append(rank)

        return visit

    def rest(visit_others: Any) -> None:
        if need_x:
            found.append(fused.reduce_scatter(comm, grad_3d, weight, overlap, visit_others))
        else:
            visit_others()

    fused.gather(comm, shard, sizes, overlap, start, rest)
    return found[0].view(x.shape) if need_x else x.new_empty(0), grad_weight


def _all_gather_matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.sizes, ctx.group, ctx.overlap = inputs
    ctx.save_for_backward(x, weight)


def _all_gather_matmul_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    grads = _all_gather_matmul_backward(
        grad.contiguous(), x, weight, ctx.sizes, ctx.group, ctx.overlap, need_x, need_weight
    )
    return *_wanted(grads, need_x, need_weight), None, None, None


# matmul_reduce_scatter


def _matmul_reduce_scatter_impl(x: Tensor, weight: Tensor, group: str, overlap: bool) -> Tensor:
    comm = communicator(group)
    out: Tensor = _fused(comm).reduce_scatter(comm, as_3d(x), weight.t(), overlap)
    return out.view(*x.shape[:-2], *out.shape[1:])


def _matmul_reduce_scatter_fake(x: Tensor, weight: Tensor, group: str, overlap: bool) -> Tensor:
    comm = communicator(group)
    return x.new_empty(*x.shape[:-2], shard_sizes(x.shape[-2], comm.world_size)[comm.rank], weight.shape[0])


def _matmul_reduce_scatter_backward_impl(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, overlap: bool, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    comm = communicator(group)
    x_3d = as_3d(x)
    grad_x = torch.empty_like(x_3d, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if need_weight else x.new_empty(0)

    def start(sizes: Sequence[int]) -> Visit:
        visited: list[int] = []

        def visit(rank: int, row: int, shard: Tensor) -> None:
            rows = slice(row, row + shard.shape[1])
            if need_x:
                multiply(shard, weight, grad_x[:, rows])
            if need_weight:
                accumulate(shard, x_3d[:, rows], grad_weight, first=not visited)
            visited.append(rank)

        return visit

    sizes = shard_sizes(x.shape[-2], comm.world_size)
    _fused(comm).gather(comm, as_3d(grad), sizes, overlap, start)
    return grad_x.view(x.shape) if need_x else grad_x, grad_weight


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.group, ctx.overlap = inputs
    ctx.save_for_backward(x, weight)


def _matmul_reduce_scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    grads = _matmul_reduce_scatter_backward(grad.contiguous(), x, weight, ctx.group, ctx.overlap, need_x, need_weight)
    return *_wanted(grads, need_x, need_weight), None, None


# matmul_all_reduce


def _matmul_all_reduce_impl(x: Tensor, weight: Tensor, group: str, overlap: bool) -> Tensor:
    comm = communicator(group)
    out: Tensor = _fused(comm).all_reduce(comm, as_3d(x), weight.t(), overlap)
    return out.view(*x.shape[:-1], weight.shape[0])


def _matmul_fake(x: Tensor, weight: Tensor, group: str, overlap: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _matmul_all_reduce_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None, None


# copy_matmul


def _copy_matmul_impl(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, overlap: bool) -> Tensor:
    return F.linear(x, weight, bias)


def _copy_matmul_fake(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, overlap: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _copy_matmul_backward_impl(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, overlap: bool, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    comm = communicator(group)
    grad_weight: list[Tensor] = []

    def weight_gradient() -> None:
        if need_weight:
            grad_weight.append(grad.flatten(0, -2).t() @ x.flatten(0, -2))

    grad_x = x.new_empty(0)
    if need_x:
        grad_x = _fused(comm).all_reduce(comm, as_3d(grad), weight, overlap, weight_gradient).view(x.shape)
    else:
        weight_gradient()
    return grad_x, grad_weight[0] if need_weight else x.new_empty(0)


def _copy_matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.group, ctx.overlap = inputs
    ctx.save_for_backward(x, weight)


def _copy_matmul_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grads = _copy_matmul_backward(grad.contiguous(), x, weight, ctx.group, ctx.overlap, need_x, need_weight)
    grad_bias = grad.flatten(0, -2).sum(0) if need_bias else None
    return *_wanted(grads, need_x, need_weight), grad_bias, None, None


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_x, need_weight = rest[-2:]
    return (
        x.new_empty(x.shape) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else x.new_empty(0),
    )


def _wanted(grads: tuple[Tensor, Tensor], need_x: bool, need_weight: bool) -> tuple[Tensor | None, Tensor | None]:
    return grads[0] if need_x else None, grads[1] if need_weight else None


_BACKWARD = "str group, bool overlap, bool need_x, bool need_weight) -> (Tensor, Tensor)"
_all_gather_matmul = define(
    "all_gather_matmul(Tensor x, Tensor weight, SymInt[]? sizes, str group, bool overlap) -> Tensor",
    _all_gather_matmul_impl,
    _all_gather_matmul_fake,
    setup_context=_all_gather_matmul_setup,
    backward=_all_gather_matmul_gradient,
)
_all_gather_matmul_backward = define(
    f"all_gather_matmul_backward(Tensor grad, Tensor x, Tensor weight, SymInt[]? sizes, {_BACKWARD}",
    _all_gather_matmul_backward_impl,
    _backward_fake,
)
_matmul_reduce_scatter = define(
    "matmul_reduce_scatter(Tensor x, Tensor weight, str group, bool overlap) -> Tensor",
    _matmul_reduce_scatter_impl,
    _matmul_reduce_scatter_fake,
    setup_context=_matmul_setup,
    backward=_matmul_reduce_scatter_gradient,
)
_matmul_reduce_scatter_backward = define(
    f"matmul_reduce_scatter_backward(Tensor grad, Tensor x, Tensor weight, {_BACKWARD}",
    _matmul_reduce_scatter_backward_impl,
    _backward_fake,
)
_matmul_all_reduce = define(
    "matmul_all_reduce(Tensor x, Tensor weight, str group, bool overlap) -> Tensor",
    _matmul_all_reduce_impl,
    _matmul_fake,
    setup_context=_matmul_setup,
    backward=_matmul_all_reduce_gradient,
)
_copy_matmul = define(
    "copy_matmul(Tensor x, Tensor weight, Tensor? bias, str group, bool overlap) -> Tensor",
    _copy_matmul_impl,
    _copy_matmul_fake,
    setup_context=_copy_matmul_setup,
    backward=_copy_matmul_gradient,
)
_copy_matmul_backward = define(
    f"copy_matmul_backward(Tensor grad, Tensor x, Tensor weight, {_BACKWARD}",
    _copy_matmul_backward_impl,
    _backward_fake,
)
