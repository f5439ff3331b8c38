"""The torch.library operators of ``overlap.py``, forward and backward; on the host by ``fused_host.py``, on GPUs that
map each other's memory by ``fused_cuda.py``, else by ``fused_any.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.tensor_parallel import fused_any, fused_cuda, fused_host
from pycomm.tensor_parallel.groups import communicator, cuda_products
from pycomm.tensor_parallel.operators import define
from pycomm.tensor_parallel.products import Product, Visit, accumulate, as_3d, multiply
from pycomm.tensor_parallel.shards import shard_sizes

__all__ = ["all_gather_matmul_op", "copy_matmul_op", "matmul_all_reduce_op", "matmul_reduce_scatter_op"]


def _fused(comm: Communicator) -> ModuleType:
    if comm.world_size == 1:
        return fused_any
    if comm.capabilities.has_flags:
        return fused_host
    return fused_any if cuda_products(comm) is None else fused_cuda


class _Wanted(NamedTuple):
    """Which gradients somebody needs."""

    x: bool
    weight: bool
    bias: bool

    def only(self, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(grad if wanted else None for grad, wanted in zip(grads, self, strict=True))


def _wanted(ctx: Any) -> _Wanted:
    """What this backward is to compute.

    A pipeline that computes gradients of weights later than those of inputs visits a node twice, and says each time
    which half it wants: ``ctx.half`` is "inputs", "weights" or, for both at once, None.
    """
    x, weight, bias = ctx.needs_input_grad[:3]
    parameters = ctx.half != "inputs"
    return _Wanted(x and ctx.half != "weights", weight and parameters, bias and parameters)


# all_gather_matmul


def _all_gather_matmul_impl(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Any, group: str, overlap: bool
) -> Tensor:
    comm = communicator(group)
    fused, shard, weight_t = _fused(comm), as_3d(x), weight.t()
    if fused is fused_cuda:
        product = fused_cuda.all_gather_matmul(comm, x, weight_t, bias, sizes, overlap)
        if product is not None:
            return product
        fused = fused_any
    out: list[Tensor] = []

    def start(sizes: Sequence[int]) -> Visit:
        out[:] = [x.new_empty(*x.shape[:-2], sum(sizes), weight.shape[0])]
        whole = as_3d(out[0])

        def visit(rank: int, row: int, shard: Tensor) -> None:
            multiply(shard, weight_t, whole[:, row : row + shard.shape[1]], bias)

        return visit

    fused.gather(comm, shard, sizes, overlap, start)
    return out[0]


def _all_gather_matmul_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Any, group: str, overlap: bool
) -> Tensor:
    rows = sum(sizes) if sizes is not None else x.shape[-2] * communicator(group).world_size
    return x.new_empty(*x.shape[:-2], rows, weight.shape[0])


def _all_gather_matmul_backward_impl(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Any, group: str, overlap: bool, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    comm = communicator(group)
    fused, shard, grad_3d = _fused(comm), as_3d(x), as_3d(grad)
    if not need_weight:
        return fused.reduce_scatter(comm, Product(grad, weight), overlap), weight.new_empty(0)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    found: list[Tensor] = []

    def start(sizes: Sequence[int]) -> Visit:
        visited: list[int] = []

        def visit(rank: int, row: int, shard: Tensor) -> None:
            accumulate(grad_3d[:, row : row + shard.shape[1]], shard, grad_weight, first=not visited)
            visited.append(rank)

        return visit

    def rest(visit_others: Any) -> None:
        if need_x:
            found.append(fused.reduce_scatter(comm, Product(grad, weight), overlap, visit_others))
        else:
            visit_others()

    fused.gather(comm, shard, sizes, overlap, start, rest)
    return found[0] if need_x else x.new_empty(0), grad_weight


def _all_gather_matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.sizes, ctx.group, ctx.overlap = inputs
    ctx.save_for_backward(x, weight)
    ctx.half = None


def _all_gather_matmul_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need = _wanted(ctx)
    grads: tuple[Tensor | None, ...] = (None, None)
    if need.x or need.weight:
        grads = _all_gather_matmul_backward(
            grad.contiguous(), x, weight, ctx.sizes, ctx.group, ctx.overlap, need.x, need.weight
        )
    return *need.only(*grads, _sum_of_rows(grad, need.bias)), None, None, None


# matmul_reduce_scatter


def _matmul_reduce_scatter_impl(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, overlap: bool) -> Tensor:
    comm = communicator(group)
    out: Tensor = _fused(comm).reduce_scatter(comm, Product(x, weight.t(), bias), overlap)
    return out


def _matmul_reduce_scatter_fake(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, overlap: bool) -> Tensor:
    comm = communicator(group)
    return x.new_empty(*x.shape[:-2], shard_sizes(x.shape[-2], comm.world_size)[comm.rank], weight.shape[0])


def _matmul_reduce_scatter_backward_impl(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, overlap: bool, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    comm = communicator(group)
    fused, x_3d = _fused(comm), as_3d(x)
    if fused is fused_cuda and need_x:
        grads = fused_cuda.matmul_reduce_scatter_backward(comm, grad, x, weight, overlap, need_weight, need_bias)
        if grads is not None:
            return grads
        fused = fused_any
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else x.new_empty(0)
    bias_parts = grad.new_zeros(comm.world_size if need_bias else 0, weight.shape[0])

    def start(sizes: Sequence[int]) -> Visit:
        visited: list[int] = []

        def visit(rank: int, row: int, shard: Tensor) -> None:
            rows = slice(row, row + shard.shape[1])
            if need_x:
                multiply(shard, weight, as_3d(grad_x)[:, rows])
            if need_weight:
                accumulate(shard, x_3d[:, rows], grad_weight, first=not visited)
            if need_bias:
                torch.sum(shard.flatten(0, -2), 0, out=bias_parts[rank])
            visited.append(rank)

        return visit

    sizes = shard_sizes(x.shape[-2], comm.world_size)
    fused.gather(comm, as_3d(grad), sizes, overlap, start)
    # Ranks visit in different orders, but have to find the same sum.
    return grad_x, grad_weight, bias_parts.sum(0) if need_bias else x.new_empty(0)


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.group, ctx.overlap = inputs
    ctx.save_for_backward(x, weight)
    ctx.half = None


def _matmul_reduce_scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need = _wanted(ctx)
    grads = _matmul_reduce_scatter_backward(grad.contiguous(), x, weight, ctx.group, ctx.overlap, *need)
    return *need.only(*grads), None, None


# matmul_all_reduce


def _matmul_all_reduce_impl(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, overlap: bool) -> Tensor:
    comm = communicator(group)
    out: Tensor = _fused(comm).all_reduce(comm, Product(x, weight.t(), bias), overlap)
    return out


def _matmul_fake(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, overlap: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _matmul_all_reduce_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need = _wanted(ctx)
    grad_x = grad @ weight if need.x else None
    grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if need.weight else None
    return grad_x, grad_weight, _sum_of_rows(grad, need.bias), None, None


# copy_matmul


def _copy_matmul_impl(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, overlap: bool) -> Tensor:
    return F.linear(x, weight, bias)


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
        grad_x = _fused(comm).all_reduce(comm, Product(grad, weight), overlap, weight_gradient)
    else:
        weight_gradient()
    return grad_x, grad_weight[0] if need_weight else x.new_empty(0)


def _copy_matmul_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need = _wanted(ctx)
    grads = _copy_matmul_backward(grad.contiguous(), x, weight, ctx.group, ctx.overlap, need.x, need.weight)
    return *need.only(*grads, _sum_of_rows(grad, need.bias)), None, None


# All of them


def _sum_of_rows(grad: Tensor, wanted: bool) -> Tensor | None:
    return grad.flatten(0, -2).sum(0) if wanted else None


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wanted = [argument for argument in rest if isinstance(argument, bool)][1:]  # the first is overlap
    shapes = (x.shape, weight.shape, weight.shape[:1])[: len(wanted)]
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, wanted, strict=True))


_FORWARD = "Tensor x, Tensor weight, Tensor? bias"
_BACKWARD = "Tensor grad, Tensor x, Tensor weight"
all_gather_matmul_op: Any = define(
    f"all_gather_matmul({_FORWARD}, SymInt[]? sizes, str group, bool overlap) -> Tensor",
    _all_gather_matmul_impl,
    _all_gather_matmul_fake,
    setup_context=_all_gather_matmul_setup,
    backward=_all_gather_matmul_gradient,
)
_all_gather_matmul_backward = define(
    f"all_gather_matmul_backward({_BACKWARD}, SymInt[]? sizes, str group, bool overlap, bool need_x, "
    "bool need_weight) -> (Tensor, Tensor)",
    _all_gather_matmul_backward_impl,
    _backward_fake,
)
matmul_reduce_scatter_op: Any = define(
    f"matmul_reduce_scatter({_FORWARD}, str group, bool overlap) -> Tensor",
    _matmul_reduce_scatter_impl,
    _matmul_reduce_scatter_fake,
    setup_context=_matmul_setup,
    backward=_matmul_reduce_scatter_gradient,
)
_matmul_reduce_scatter_backward = define(
    f"matmul_reduce_scatter_backward({_BACKWARD}, str group, bool overlap, bool need_x, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
    _matmul_reduce_scatter_backward_impl,
    _backward_fake,
)
matmul_all_reduce_op: Any = define(
    f"matmul_all_reduce({_FORWARD}, str group, bool overlap) -> Tensor",
    _matmul_all_reduce_impl,
    _matmul_fake,
    setup_context=_matmul_setup,
    backward=_matmul_all_reduce_gradient,
)
copy_matmul_op: Any = define(
    f"copy_matmul({_FORWARD}, str group, bool overlap) -> Tensor",
    _copy_matmul_impl,
    _matmul_fake,
    setup_context=_matmul_setup,
    backward=_copy_matmul_gradient,
)
_copy_matmul_backward = define(
    f"copy_matmul_backward({_BACKWARD}, str group, bool overlap, bool need_x, bool need_weight) -> (Tensor, Tensor)",
    _copy_matmul_backward_impl,
    _backward_fake,
)
