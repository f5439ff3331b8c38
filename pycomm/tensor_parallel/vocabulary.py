"""Work on a vocabulary that is cut over the ranks: looking up ids in own rows, and cross-entropy of own logits.

**Cross-entropy.** Nobody ever has all logits. Per token, ranks exchange the largest logit, the sum of exponentials, the
target's logit and, with label smoothing, the sum of logits: 8 to 16 bytes instead of the vocabulary. The only tensor
of the logits' size that is made is their gradient; exponentials of the forward pass are made a block of rows at a time.

Ref: "Megatron-LM" (2019), section 3; z-loss: "PaLM: Scaling Language Modeling with Pathways" (2022), section 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycomm.communicator import Communicator, communicator_of
from pycomm.errors import MismatchError
from pycomm.tensor_parallel.library import define

__all__ = ["vocab_lookup", "vocab_parallel_cross_entropy"]

_BLOCK_ELEMENTS = 1 << 18  # exponentials at a time: 1 MiB of fp32, which stays in a core's cache


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    comm: Communicator,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean cross-entropy over counted tokens, in nats. Collective, in forward only.

    Args:
        logits: [..., V_r], this rank's columns; the ranks' parts lie one after the other and may have any widths.
        target: [...] int64 of the whole vocabulary, the same on every rank.
        ignore_index: tokens with this target do not count.
        label_smoothing: weight of the uniform distribution over the whole vocabulary, as in torch.
        z_loss: adds ``z_loss * mean(log(sum(exp(logits))) ** 2)``, which keeps logits from drifting.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits), the same on every rank; NaN where no token counts, as in torch.
        Exponentials and sums are in that dtype for 16-bit logits, too.

    Raises:
        ValueError: shapes do not fit, or a target is outside the vocabulary.
        MismatchError: ranks have different numbers of tokens.
    """
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target {tuple(target.shape)} does not fit logits {tuple(logits.shape)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: it is between 0 and 1")
    losses, _, _ = _token_losses(
        logits.flatten(0, -2), target.flatten(), ignore_index, label_smoothing, z_loss, comm.key
    )
    total: Tensor = losses.sum() / (target != ignore_index).sum()
    return total


def _layout(logits: Tensor, comm: Communicator) -> tuple[int, int]:
    """Where this rank's columns start, and how many there are on all ranks."""
    mine = torch.tensor(logits.shape[::-1], dtype=torch.int64, device=logits.device)
    found = mine.new_empty(comm.world_size, 2)
    comm.all_gather(found, mine)
    widths, tokens = found.unbind(1)
    if (tokens != tokens[0]).any():
        calls = {r: f"vocab_parallel_cross_entropy of {count} tokens" for r, count in enumerate(tokens.tolist())}
        raise MismatchError(f"ranks of group {comm.name!r} have different numbers of tokens: {calls}", calls=calls)
    return int(widths[: comm.rank].sum()), int(widths.sum())


def _token_losses_impl(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    comm = communicator_of(group)
    start, total = _layout(logits, comm)
    counted = target != ignore_index
    if ((target < 0) | (target >= total)).logical_and_(counted).any():
        raise ValueError(f"a target is outside the vocabulary of {total}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    tokens, width = logits.shape
    largest = logits.new_full((tokens,), -torch.inf, dtype=dtype)
    if width:
        torch.amax(logits, 1, out=largest) if logits.dtype == dtype else largest.copy_(logits.amax(1))
    comm.all_reduce(largest, op="max")
    # Of each token: the sum of exponentials, the target's logit, the sum of logits.
    sums = logits.new_zeros((3, tokens), dtype=dtype)
    rows = max(1, _BLOCK_ELEMENTS // max(1, width))
    for low in range(0, tokens, rows):
        block = slice(low, low + rows)
        shifted = torch.sub(logits[block], largest[block, None])
        if label_smoothing:
            torch.sum(shifted, 1, out=sums[2, block])
        torch.sum(shifted.exp_(), 1, out=sums[0, block])
    local = target - start
    here = (local >= 0) & (local < width) & counted
    rows_here = here.nonzero().squeeze(1)
    sums[1, rows_here] = logits[rows_here, local[rows_here]].to(dtype) - largest[rows_here]
    comm.all_reduce(sums)
    log_sum = sums[0].log()
    losses = log_sum - sums[1]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (log_sum - sums[2] / total)
    log_sum += largest
    if z_loss:
        losses = losses + z_loss * log_sum.square()
    where = torch.where(here, local, -1)
    return losses.masked_fill_(~counted, 0.0), log_sum, torch.cat([where, where.new_tensor([total])])


def _token_losses_fake(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    tokens = logits.shape[0]
    return (
        logits.new_empty(tokens, dtype=dtype),
        logits.new_empty(tokens, dtype=dtype),
        target.new_empty(tokens + 1),
    )


def _logits_gradient_impl(
    grad: Tensor, logits: Tensor, log_sum: Tensor, where: Tensor, label_smoothing: float, z_loss: float
) -> Tensor:
    """``grad``: of each token's loss, zero for ignored ones."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    tokens, width = logits.shape
    where, total = where[:-1], where[-1]
    scale = grad * (1 + 2 * z_loss * log_sum)
    rows = max(1, _BLOCK_ELEMENTS // max(1, width))
    for low in range(0, tokens, rows):
        block = slice(low, low + rows)
        part = torch.sub(logits[block], log_sum[block, None]).exp_().mul_(scale[block, None])
        if label_smoothing:
            part -= (grad[block] * label_smoothing / total)[:, None]
        here = where[block]
        hit = (here >= 0).nonzero().squeeze(1)
        part[hit, here[hit]] -= (1 - label_smoothing) * grad[block][hit]
        out[block] = part  # the only rounding of a 16-bit gradient
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, ignore_index, ctx.label_smoothing, ctx.z_loss, _ = inputs
    _, log_sum, where = output
    ctx.ignore_index = ignore_index
    ctx.mark_non_differentiable(log_sum, where)
    ctx.save_for_backward(logits, target, log_sum, where)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, target, log_sum, where = ctx.saved_tensors
    grad = grad.masked_fill(target == ctx.ignore_index, 0.0)
    out = _logits_gradient(grad, logits, log_sum, where, ctx.label_smoothing, ctx.z_loss)
    return out, None, None, None, None, None


_token_losses = define(
    "vocab_parallel_token_losses(Tensor logits, Tensor target, int ignore_index, float label_smoothing, float z_loss, "
    "str group) -> (Tensor, Tensor, Tensor)",
    _token_losses_impl,
    _token_losses_fake,
    setup_context=_setup,
    backward=_gradient,
)
_logits_gradient = define(
    "vocab_parallel_logits_gradient(Tensor grad, Tensor logits, Tensor log_sum, Tensor where, float label_smoothing, "
    "float z_loss) -> Tensor",
    _logits_gradient_impl,
    lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


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


def _setup_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, ctx.start, _, ctx.padding_idx = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _lookup_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return None, _lookup_gradient(grad, ids, ctx.start, ctx.rows, ctx.padding_idx), None, None, None


_lookup = define(
    "vocab_lookup(Tensor ids, Tensor weight, int start, int total, int padding_idx) -> Tensor",
    _lookup_impl,
    _lookup_fake,
    setup_context=_setup_lookup,
    backward=_lookup_backward,
)
_lookup_gradient = define(
    "vocab_lookup_gradient(Tensor grad, Tensor ids, int start, SymInt rows, int padding_idx) -> Tensor",
    _gradient_impl,
    lambda grad, ids, start, rows, padding_idx: grad.new_empty(rows, grad.shape[-1]),
)
