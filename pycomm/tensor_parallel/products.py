"""Products of [B, S, K] with matrices, into memory that is already there."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Visit", "accumulate", "as_3d", "multiply", "nothing"]


class Visit(Protocol):
    """What is done with one rank's shard [B, s, K], whose rows start at ``row`` of the whole."""

    def __call__(self, rank: int, row: int, shard: Tensor, /) -> None: ...


def as_3d(x: Tensor) -> Tensor:
    """[…, S, K] as [B, S, K]; [S, K] as [1, S, K]."""
    return x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3) if x.dim() > 3 else x


def multiply(x: Tensor, weight_t: Tensor, out: Tensor) -> None:
    """``out = x @ weight_t``: [B, s, K] times [K, N], where ``x`` and ``out`` may be rows of something longer."""
    if x.shape[0] == 1:
        torch.mm(x[0], weight_t, out=out[0])
    else:
        torch.bmm(x, weight_t.expand(x.shape[0], -1, -1), out=out)


def accumulate(grad: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
    """``out (+)= grad^T @ x``, summed over all rows: [B, s, N], [B, s, K], [N, K]."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    torch.addmm(out, grad.t(), x, beta=0 if first else 1, out=out)


def nothing() -> None:
    """For who has nothing else to do meanwhile."""
