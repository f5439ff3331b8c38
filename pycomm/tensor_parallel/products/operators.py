"""The products as functions of tensors and a communicator, and as torch.library operators, which take its key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycomm.communicator import Communicator, communicator_of
from pycomm.tensor_parallel.library import define
from pycomm.tensor_parallel.products.cuda import CudaProducts
from pycomm.tensor_parallel.products.plain import PlainProducts
from pycomm.tensor_parallel.products.protocol import Gradients, Products
from pycomm.tensor_parallel.shards import shard_sizes

__all__ = ["all_gather_matmul", "copy_matmul", "matmul_all_reduce", "matmul_reduce_scatter", "products_of"]


def products_of(comm: Communicator) -> Products:
    """The implementation that suits ``comm``, which owns it. Chosen in the first product, which is collective."""
    found: Products | None = comm.attached.get(Products)
    if found is None:
        if comm.capabilities.orders_on_device and comm.world_size > 1:
            found = CudaProducts.connect(comm)
        found = comm.attached[Products] = found or PlainProducts(comm)
    return found


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
        overlap: where ranks do not share a host's memory: multiply own rows while the others' are under way; in
            backward, the weight's gradient, too. It changes no bit.

    Returns:
        [S, N] or […, S, N], S being the sum over ranks of s.

    Raises:
        ValueError: shapes do not fit, or ``sizes`` is not what the ranks have.
        MismatchError: another rank called something else, or with another K or dtype.
    """
    x, weight, bias = _checked(x, weight, bias)
    if sizes is None and torch.compiler.is_compiling():
        sizes = [x.shape[-2]] * comm.world_size
    out: Tensor = _all_gather_matmul(x, weight, bias, sizes, overlap, comm.key)
    return out


def matmul_reduce_scatter(
    x: Tensor, weight: Tensor, comm: Communicator, bias: Tensor | None = None, *, overlap: bool = True
) -> Tensor:
    """``x @ weight.T`` summed over ranks, ``+ bias``: this rank's rows. Collective, in forward and in backward.

    Args:
        x: [S, K] or […, S, K]; S is the same on all ranks, K may differ.
        weight: [N, K].
        bias: [N], the same on every rank and added once; its gradient is that of all rows, on every rank.
        overlap: as of :func:`all_gather_matmul`.

    Returns:
        [s, N] or […, s, N], s being this rank's part of S by the rule of ``torch.chunk``. Summed in rank order, 16-bit
        floats in fp32.

    Raises:
        ValueError, MismatchError: as :func:`all_gather_matmul`.
    """
    x, weight, bias = _checked(x, weight, bias)
    out: Tensor = _matmul_reduce_scatter(x, weight, bias, overlap, comm.key)
    return out


def matmul_all_reduce(
    x: Tensor, weight: Tensor, comm: Communicator, bias: Tensor | None = None, *, overlap: bool = True
) -> Tensor:
    """``x @ weight.T`` summed over ranks, ``+ bias``, on every rank. Collective in forward.

    Args:
        x: […, K]; the leading dimensions are the same on all ranks, K may differ.
        weight: [N, K].
        bias: [N], the same on every rank and added once.
        overlap: as of :func:`all_gather_matmul`.

    Returns:
        […, N]; the same bits on every rank. The gradient that comes back is taken to be the same on every rank, too.

    Raises:
        ValueError, MismatchError: as :func:`all_gather_matmul`.
    """
    x, weight, bias = _checked(x, weight, bias)
    out: Tensor = _matmul_all_reduce(x, weight, bias, overlap, comm.key)
    return out


def copy_matmul(
    x: Tensor, weight: Tensor, comm: Communicator, bias: Tensor | None = None, *, overlap: bool = True
) -> Tensor:
    """``x @ weight.T + bias`` of an x that all ranks have. Collective in backward, which sums x's gradient over ranks.

    Args:
        x: […, K], the same on every rank.
        weight: [N, K]; ``bias``: [N]; N may differ between ranks.
        overlap: as of :func:`all_gather_matmul`.
    """
    x, weight, bias = _checked(x, weight, bias)
    out: Tensor = _copy_matmul(x, weight, bias, overlap, comm.key)
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


# torch.library


class _Wanted(NamedTuple):
    """Which gradients somebody needs."""

    x: bool
    weight: bool
    bias: bool


def _wanted(ctx: Any) -> _Wanted:
    """What this backward is to compute.

    A pipeline that computes gradients of weights later than those of inputs visits a node twice, and says each time
    which half it wants: ``ctx.half`` is "inputs", "weights" or, for both at once, None.
    """
    x, weight, bias = ctx.needs_input_grad[:3]
    parameters = ctx.half != "inputs"
    return _Wanted(x and ctx.half != "weights", weight and parameters, bias and parameters)


def _define(
    forward: Callable[..., Tensor], backward: Callable[..., Gradients], fake: Callable[..., Tensor], sizes: str = ""
) -> tuple[Any, Any]:
    """Two methods of :class:`Products` as operators.

    Args:
        fake: an empty tensor like the result.
        sizes: what stands between the tensors and ``overlap`` in the schema.
    """

    def method(name: str) -> Callable[..., Any]:
        return lambda *args: getattr(products_of(communicator_of(args[-1])), name)(*args[:-1])

    def backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Gradients:
        shapes = (x.shape, weight.shape, weight.shape[:1])
        of_x, of_weight, of_bias = (
            x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, rest[-4:-1], strict=True)
        )
        return of_x, of_weight, of_bias

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.others, ctx.group = inputs
        ctx.save_for_backward(x, weight)
        ctx.half = None

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = _wanted(ctx)
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if any(wanted):
            found = backward_operator(grad.contiguous(), x, weight, *ctx.others, *wanted, ctx.group)
            grads = tuple(grad if need else None for grad, need in zip(found, wanted, strict=True))
        return *grads, *(None for _ in ctx.others), None

    backward_operator = define(
        f"{backward.__name__}(Tensor grad, Tensor x, Tensor weight, {sizes}bool overlap, "
        "bool need_x, bool need_weight, bool need_bias, str group) -> (Tensor, Tensor, Tensor)",
        method(backward.__name__),
        backward_fake,
    )
    forward_operator = define(
        f"{forward.__name__}(Tensor x, Tensor weight, Tensor? bias, {sizes}bool overlap, str group) -> Tensor",
        method(forward.__name__),
        fake,
        setup_context=keep,
        backward=gradient,
    )
    return forward_operator, backward_operator


def _fake_gathered(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Any, overlap: bool, group: str) -> Tensor:
    rows = sum(sizes) if sizes is not None else x.shape[-2] * communicator_of(group).world_size
    return x.new_empty(*x.shape[:-2], rows, weight.shape[0])


def _fake_scattered(x: Tensor, weight: Tensor, bias: Tensor | None, overlap: bool, group: str) -> Tensor:
    comm = communicator_of(group)
    return x.new_empty(*x.shape[:-2], shard_sizes(x.shape[-2], comm.world_size)[comm.rank], weight.shape[0])


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_all_gather_matmul, _all_gather_matmul_backward = _define(
    Products.all_gather_matmul, Products.all_gather_matmul_backward, _fake_gathered, "SymInt[]? sizes, "
)
_matmul_reduce_scatter, _matmul_reduce_scatter_backward = _define(
    Products.matmul_reduce_scatter, Products.matmul_reduce_scatter_backward, _fake_scattered
)
_matmul_all_reduce, _matmul_all_reduce_backward = _define(
    Products.matmul_all_reduce, Products.matmul_all_reduce_backward, _fake
)
_copy_matmul, _copy_matmul_backward = _define(Products.copy_matmul, Products.copy_matmul_backward, _fake)
