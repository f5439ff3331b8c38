"""The conjugate operators of tensor parallelism: each one's gradient is the other of its pair.

=======================  =========================  ==============================================
operator                 forward                    backward
=======================  =========================  ==============================================
``copy_to_ranks``        nothing                    sum over ranks
``reduce_from_ranks``    sum over ranks             nothing
``gather_from_ranks``    concatenate over ranks     this rank's part
``scatter_to_ranks``     this rank's part           concatenate over ranks
``all_gather``           concatenate over ranks     sum over ranks, this rank's part
``reduce_scatter``       sum over ranks, own part   concatenate over ranks
=======================  =========================  ==============================================

Which one: ``gather_from_ranks`` where what follows is the same on every rank, ``all_gather`` where every rank goes on
with something of its own. Parts follow the rule of ``torch.chunk``. All are collective in whichever direction they
communicate, torch.library operators that torch.compile traces, and take any back end.

Refs: "Megatron-LM" (2019) for f and g; "Reducing Activation Recomputation in Large Transformer Models" (2022) for
the sequence-parallel pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm.communicator import Communicator, communicator_of
from pycomm.tensor_parallel.library import define
from pycomm.tensor_parallel.shards import shard_sizes, start_of

__all__ = [
    "all_gather",
    "copy_to_ranks",
    "gather_from_ranks",
    "reduce_from_ranks",
    "reduce_scatter",
    "scatter_to_ranks",
    "sizes_of",
]


def copy_to_ranks(x: Tensor, comm: Communicator) -> Tensor:
    """A copy of x, which every rank has; its gradient is the sum of the ranks'."""
    out: Tensor = _copy(x, comm.key)
    return out


def reduce_from_ranks(x: Tensor, comm: Communicator) -> Tensor:
    """The sum of the ranks' x, in rank order; the gradient, which is the same on every rank, goes to each of them."""
    out: Tensor = _reduce(x, comm.key)
    return out


def gather_from_ranks(x: Tensor, comm: Communicator, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
    """The ranks' x, one after the other along ``dim``; the gradient is the own part of one that all ranks have.

    Args:
        sizes: of ``dim`` on each rank; None: found out by a small collective. Under torch.compile None means equal.
    """
    out: Tensor = _gather(x, dim % x.dim(), sizes_of(x, dim, sizes, comm), comm.key)
    return out


def scatter_to_ranks(x: Tensor, comm: Communicator, dim: int = -1) -> Tensor:
    """This rank's part of an x that every rank has; a copy. The gradients of the parts are concatenated."""
    out: Tensor = _scatter(x, dim % x.dim(), comm.key)
    return out


def all_gather(x: Tensor, comm: Communicator, dim: int = -2, sizes: Sequence[int] | None = None) -> Tensor:
    """The ranks' x, one after the other along ``dim``; the gradient is summed over ranks and scattered.

    ``sizes`` as in :func:`gather_from_ranks`.
    """
    out: Tensor = _all_gather(x, dim % x.dim(), sizes_of(x, dim, sizes, comm), comm.key)
    return out


def reduce_scatter(x: Tensor, comm: Communicator, dim: int = -2, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part along ``dim`` of the sum of the ranks' x; the gradients of the parts are concatenated.

    Args:
        sizes: of each rank's part; None: by the rule of ``torch.chunk``.
    """
    parts = shard_sizes(x.shape[dim], comm.world_size) if sizes is None else list(sizes)
    out: Tensor = _reduce_scatter(x, dim % x.dim(), parts, comm.key)
    return out


def sizes_of(x: Tensor, dim: int, sizes: Sequence[int] | None, comm: Communicator) -> list[int]:
    """``sizes``, or if None those of ``dim`` on every rank: a small collective; compiled code takes them as equal."""
    if sizes is not None:
        return list(sizes)
    if torch.compiler.is_compiling() or comm.world_size == 1:
        return [x.shape[dim]] * comm.world_size
    return [int(size) for (size,) in comm.agree([x.shape[dim]])]


def _sum_over_ranks(x: Tensor, group: str) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    communicator_of(group).all_reduce(out)
    return out


def _concatenate(x: Tensor, dim: int, sizes: Sequence[int], group: str) -> Tensor:
    comm = communicator_of(group)
    if sizes[comm.rank] != x.shape[dim]:
        raise ValueError(f"this rank has {x.shape[dim]} of dimension {dim}, sizes says {sizes[comm.rank]}")
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
    counts = [torch.Size(shape).numel() for shape in shapes]
    whole = x.new_empty(*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :])
    flat = whole.view(-1)
    comm.all_gather(flat, x.contiguous(), output_splits=counts)
    if x.shape[:dim].numel() == 1:  # parts lie as they shall
        return whole
    parts = [part.view(shape) for part, shape in zip(flat.split(counts), shapes, strict=True)]
    return torch.cat(parts, dim)


def _own_part(x: Tensor, dim: int, group: str) -> Tensor:
    comm = communicator_of(group)
    sizes = shard_sizes(x.shape[dim], comm.world_size)
    return x.narrow(dim, start_of(sizes, comm.rank), sizes[comm.rank]).clone(memory_format=torch.contiguous_format)


def _sum_of_own_part(x: Tensor, dim: int, sizes: Sequence[int], group: str) -> Tensor:
    comm = communicator_of(group)
    parts = [part.flatten() for part in x.split(sizes, dim)]
    out = x.new_empty(*x.shape[:dim], sizes[comm.rank], *x.shape[dim + 1 :])
    comm.reduce_scatter(out, torch.cat(parts), input_splits=[part.numel() for part in parts])
    return out


def _same(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _whole(x: Tensor, dim: int, sizes: Sequence[int], group: str) -> Tensor:
    return x.new_empty(*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :])


def _part(x: Tensor, dim: int, group: str) -> Tensor:
    comm = communicator_of(group)
    return x.new_empty(*x.shape[:dim], shard_sizes(x.shape[dim], comm.world_size)[comm.rank], *x.shape[dim + 1 :])


def _part_of(x: Tensor, dim: int, sizes: Sequence[int], group: str) -> Tensor:
    return x.new_empty(*x.shape[:dim], sizes[communicator_of(group).rank], *x.shape[dim + 1 :])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What a backward needs: no tensors, only where they were cut."""
    x, *rest, ctx.group = inputs
    if rest:
        ctx.dim = rest[0]
        ctx.sizes = rest[1] if len(rest) > 1 else None
        ctx.total = x.shape[ctx.dim]


def _parts_again(ctx: Any) -> list[int]:
    return shard_sizes(ctx.total, communicator_of(ctx.group).world_size)


def _narrowed(ctx: Any, grad: Tensor) -> Tensor:
    rank = communicator_of(ctx.group).rank
    return grad.narrow(ctx.dim, start_of(ctx.sizes, rank), ctx.sizes[rank])


_copy: Any = define(
    "copy_to_ranks(Tensor x, str group) -> Tensor",
    lambda x, group: x.clone(memory_format=torch.contiguous_format),
    _same,
    setup_context=_keep,
    backward=lambda ctx, grad: (_reduce(grad, ctx.group), None),
)
_reduce: Any = define(
    "reduce_from_ranks(Tensor x, str group) -> Tensor",
    _sum_over_ranks,
    _same,
    setup_context=_keep,
    backward=lambda ctx, grad: (grad, None),
)
_gather: Any = define(
    "gather_from_ranks(Tensor x, int dim, SymInt[] sizes, str group) -> Tensor",
    _concatenate,
    _whole,
    setup_context=_keep,
    backward=lambda ctx, grad: (_narrowed(ctx, grad), None, None, None),
)
_scatter: Any = define(
    "scatter_to_ranks(Tensor x, int dim, str group) -> Tensor",
    _own_part,
    _part,
    setup_context=_keep,
    backward=lambda ctx, grad: (_gather(grad, ctx.dim, _parts_again(ctx), ctx.group), None, None),
)
_all_gather: Any = define(
    "all_gather(Tensor x, int dim, SymInt[] sizes, str group) -> Tensor",
    _concatenate,
    _whole,
    setup_context=_keep,
    backward=lambda ctx, grad: (_reduce_scatter(grad, ctx.dim, ctx.sizes, ctx.group), None, None, None),
)
_reduce_scatter: Any = define(
    "reduce_scatter(Tensor x, int dim, SymInt[] sizes, str group) -> Tensor",
    _sum_of_own_part,
    _part_of,
    setup_context=_keep,
    backward=lambda ctx, grad: (_all_gather(grad, ctx.dim, ctx.sizes, ctx.group), None, None, None),
)
