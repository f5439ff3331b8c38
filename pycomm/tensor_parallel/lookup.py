"""Looking up ids in this rank's rows of an embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycomm.tensor_parallel.operators import define

__all__ = ["vocab_lookup"]


def vocab_lookup(ids: Tensor, weight: Tensor, start: int, total: int, padding_idx: int | None = None) -> Tensor:
    """Rows of ``weight`` for the ids that it has, zeros for the others. No communication.

    Args:
        ids: […] int64 or int32, of the whole vocabulary.
        weight: [rows, D], rows ``start`` to ``start + rows`` of the whole.
        total: size of the whole vocabulary.
        padding_idx: an id whose row gets no gradient.

    Raises:
        IndexError: an id is outside the vocabulary (checked on the host only: a GPU would have to wait for it).
    """
    out: Tensor = _lookup(ids, weight, start, total, -1 if padding_idx is None else padding_idx)
    return out


def _lookup_impl(ids: Tensor, weight: Tensor, start: int, total: int, padding_idx: int) -> Tensor:
    if not ids.is_cuda and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= total):
        raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())}: the vocabulary has {total}")
    local = ids.flatten() - start
    others = (local < 0) | (local >= weight.shape[0])
    if weight.shape[0] == 0:
        return weight.new_zeros(*ids.shape, weight.shape[1])
    out = weight.new_empty(*ids.shape, weight.shape[1])
    rows = out.view(-1, weight.shape[1])
    torch.index_select(weight, 0, local.masked_fill_(others, 0), out=rows)
    rows.masked_fill_(others.unsqueeze(1), 0.0)
    return out


def _lookup_fake(ids: Tensor, weight: Tensor, start: int, total: int, padding_idx: int) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _gradient_impl(grad: Tensor, ids: Tensor, start: int, rows: int, padding_idx: int) -> Tensor:
    local = ids.flatten() - start
    mine = (local >= 0) & (local < rows) & (ids.flatten() != padding_idx)
    chosen = mine.nonzero().squeeze(1)
    out = grad.new_zeros(rows, grad.shape[-1])
    return out.index_add_(0, local[chosen], grad.flatten(0, -2)[chosen])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, ctx.start, _, ctx.padding_idx = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return None, _lookup_gradient(grad, ids, ctx.start, ctx.rows, ctx.padding_idx), None, None, None


_lookup = define(
    "vocab_lookup(Tensor ids, Tensor weight, int start, int total, int padding_idx) -> Tensor",
    _lookup_impl,
    _lookup_fake,
    setup_context=_setup,
    backward=_gradient,
)
_lookup_gradient = define(
    "vocab_lookup_gradient(Tensor grad, Tensor ids, int start, SymInt rows, int padding_idx) -> Tensor",
    _gradient_impl,
    lambda grad, ids, start, rows, padding_idx: grad.new_empty(rows, grad.shape[-1]),
)
