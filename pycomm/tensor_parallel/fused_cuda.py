"""The operations of ``fused_host.py`` on GPUs that map each other's memory: ``pycomm.gpu.OverlappedMatmuls``.

Rows move by copy engine while cuBLASLt multiplies, and partial products are added in rank order, 16-bit ones in fp32
with one rounding (csrc/cuda/matmul/plan.hpp has the steps). Weights are read as they lie. Without ``overlap`` the same
steps run one after the other, so the bits are the same. A call that overlapped products do not take (a rank without
features) goes by collectives, on all ranks.

Overlapped products know rows, not sequences: of several sequences each rank's rows are laid one after the other first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.gpu import OverlappedMatmuls
from pycomm.tensor_parallel import fused_any
from pycomm.tensor_parallel.cuda_products import CudaProducts
from pycomm.tensor_parallel.descriptors import ALL_REDUCE, GATHER, REDUCE_SCATTER
from pycomm.tensor_parallel.groups import cuda_products
from pycomm.tensor_parallel.products import Product, Visit, as_3d, nothing
from pycomm.tensor_parallel.shards import shard_sizes, start_of

__all__ = ["all_gather_matmul", "all_reduce", "gather", "matmul_reduce_scatter_backward", "reduce_scatter"]


def all_gather_matmul(
    comm: Communicator,
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int] | None,
    overlap: bool,
) -> Tensor | None:
    """``cat(x over ranks) @ weight_t + bias``.

    Args:
        x: […, s, K], this rank's.
        weight_t: [K, N].
        sizes: s of each rank; None: found out.

    Returns:
        […, S, N]; None, on all ranks: not a call for overlapped products.
    """
    done = _gather_and_multiply(comm, x, weight_t, sizes, overlap)
    if done is None:
        return None
    return done.out if bias is None else done.out.add_(bias)


def matmul_reduce_scatter_backward(
    comm: Communicator,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    overlap: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of x, weight and bias, of which the latter two are empty if nobody needs them; None: as above.

    Args:
        grad: […, s, N], of this rank's rows; gathered once, for the product and for the weight's gradient.
    """
    sizes = shard_sizes(x.shape[-2], comm.world_size)
    done = _gather_and_multiply(comm, grad, weight, sizes, overlap)
    if done is None:
        return None
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if need_weight or need_bias:
        whole = done.matmuls.gathered(done.rows, weight.shape[0])
        whole[start_of(done.rows, comm.rank) :][: done.rows[comm.rank]].copy_(done.shard)
        if need_weight:
            grad_weight = whole.t() @ _by_rank(as_3d(x), sizes)
        if need_bias:
            grad_bias = whole.sum(0)
    return done.out, grad_weight, grad_bias


def gather(
    comm: Communicator,
    shard: Tensor,
    sizes: Sequence[int] | None,
    overlap: bool,
    start: Callable[[Sequence[int]], Visit],
    rest: Callable[[Callable[[], None]], None] = lambda visit_others: visit_others(),
) -> None:
    """As ``fused_host.gather``, by NCCL, of rows that ranks have shown each other over the host."""
    shown = _products(comm).show(GATHER, shard, shard.shape[2], shard.shape[2])
    fused_any.gather(comm, shard, sizes, overlap, start, rest, found=shown.rows)


def reduce_scatter(
    comm: Communicator, product: Product, overlap: bool, meanwhile: Callable[[], None] = nothing
) -> Tensor:
    """As ``fused_host.reduce_scatter``; the bias is added to the sum."""
    x, products = product.x, _products(comm)
    x_3d = as_3d(x)
    batch, width = x_3d.shape[0], product.weight_t.shape[1]
    shown = products.show(REDUCE_SCATTER, x_3d, x_3d.shape[2], width)
    sizes = shard_sizes(x_3d.shape[1], comm.world_size)
    rows = [batch * size for size in sizes]
    matmuls = products.matmuls(x.dtype, rows, shown)
    if matmuls is None:
        return fused_any.reduce_scatter(comm, product, overlap, meanwhile)
    out = x.new_empty(*x.shape[:-2], sizes[comm.rank], width)
    _multiply(products, matmuls.matmul_reduce_scatter, _by_rank(x_3d, sizes), product, rows, out, overlap, meanwhile)
    return out


def all_reduce(comm: Communicator, product: Product, overlap: bool, meanwhile: Callable[[], None] = nothing) -> Tensor:
    """As ``fused_host.all_reduce``; the bias is added to the sum."""
    x, products = product.x, _products(comm)
    flat = x.reshape(1, x.shape[:-1].numel(), x.shape[-1]).contiguous()
    width = product.weight_t.shape[1]
    shown = products.show(ALL_REDUCE, flat, flat.shape[2], width)
    rows = shard_sizes(flat.shape[1], comm.world_size)
    matmuls = products.matmuls(x.dtype, rows, shown)
    if matmuls is None:
        return fused_any.all_reduce(comm, product, overlap, meanwhile)
    out = x.new_empty(*x.shape[:-1], width)
    _multiply(products, matmuls.matmul_all_reduce, flat[0], product, rows, out, overlap, meanwhile)
    return out


class _Gathered(NamedTuple):
    """A product of gathered rows.

    Attributes:
        out: […, S, N].
        rows: of every rank, in what was gathered.
        shard: [r, K], this rank's of them.
    """

    matmuls: OverlappedMatmuls
    out: Tensor
    rows: list[int]
    shard: Tensor


def _gather_and_multiply(
    comm: Communicator, x: Tensor, weight_t: Tensor, sizes: Sequence[int] | None, overlap: bool
) -> _Gathered | None:
    """``cat(x over ranks) @ weight_t`` of x […, s, K]."""
    products, shard = _products(comm), as_3d(x)
    batch, _, in_features = shard.shape
    width = weight_t.shape[1]
    shown = products.show(GATHER, shard, in_features, width)
    if sizes is not None and shown.rows != list(sizes):
        raise ValueError(f"the ranks have {shown.rows} rows, expected {list(sizes)}: pass the sizes that they have")
    rows = [batch * size for size in shown.rows]
    matmuls = products.matmuls(x.dtype, rows, shown)
    if matmuls is None:
        return None
    out = x.new_empty(*x.shape[:-2], sum(shown.rows), width)
    by_rank = out.view(-1, width) if batch == 1 else x.new_empty(sum(rows), width)
    flat = shard.reshape(-1, in_features).contiguous()
    weight, transposed = _as_it_lies(weight_t)
    options = {"transposed": transposed, "one_by_one": not overlap, "outs": [by_rank]}
    matmuls.all_gather_matmul([flat], [weight], rows, **options)
    if batch != 1 and out.numel():
        blocks = zip(by_rank.split(rows), shown.rows, strict=True)
        torch.cat([block.view(batch, size, width) for block, size in blocks], 1, out=as_3d(out))
    return _Gathered(matmuls, out, rows, flat)


def _multiply(
    products: CudaProducts,
    call: Callable[..., object],
    x: Tensor,
    product: Product,
    rows: Sequence[int],
    out: Tensor,
    overlap: bool,
    meanwhile: Callable[[], None],
) -> None:
    """``call`` of ``x`` into ``out``, with ``meanwhile`` beside it on the current stream, or after it."""
    weight, transposed = _as_it_lies(product.weight_t)
    options = {"transposed": transposed, "one_by_one": not overlap, "outs": [out.view(-1, out.shape[-1])]}
    if overlap and meanwhile is not nothing:
        with products.side.behind_current():
            call([x], [weight], rows, **options)
        try:
            meanwhile()
        finally:
            products.side.rejoin()
    else:
        call([x], [weight], rows, **options)
        meanwhile()
    if product.bias is not None:
        out.add_(product.bias)


def _products(comm: Communicator) -> CudaProducts:
    products = cuda_products(comm)
    assert products is not None  # whoever chose this module looked
    return products


def _as_it_lies(weight_t: Tensor) -> tuple[Tensor, bool]:
    """Contiguous memory of [K, N] ``weight_t``, and whether it is that (or its transpose)."""
    if weight_t.t().is_contiguous():
        return weight_t.t(), False
    return weight_t.contiguous(), True


def _by_rank(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[B, S, K] as [B * S, K]: first the rows of all sequences that are rank 0's."""
    if x.shape[0] == 1:
        return x[0].contiguous()
    return torch.cat([part.reshape(-1, x.shape[2]) for part in x.split(list(sizes), 1)])
