"""Products of [B, S, K] with matrices and sums of partial products, into memory that is already there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pycomm import _C
from pycomm.fused import dtype_name

__all__ = ["Product", "Visit", "accumulate", "add", "as_3d", "multiply", "nothing", "shown"]

_NOT_SHOWN = nullcontext()


class Product(NamedTuple):
    """What a rank multiplies for a sum over ranks.

    Attributes:
        x: […, S, K], where K may differ between ranks.
        weight_t: [K, N], any strides.
        bias: [N], added once: rank 0's partial product starts from it.
    """

    x: Tensor
    weight_t: Tensor
    bias: Tensor | None = None

    def of_rank(self, rank: int) -> Product:
        """Its part in the sum."""
        return self if rank == 0 else Product(self.x, self.weight_t)


class Visit(Protocol):
    """What is done with one rank's shard [B, s, K], whose rows start at ``row`` of the whole."""

    def __call__(self, rank: int, row: int, shard: Tensor, /) -> None: ...


def as_3d(x: Tensor) -> Tensor:
    """[…, S, K] as [B, S, K]; [S, K] as [1, S, K]."""
    return x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3) if x.dim() > 3 else x


def multiply(x: Tensor, weight_t: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """``out = x @ weight_t + bias``: [B, s, K] times [K, N]; ``x`` and ``out`` may be rows of something longer."""
    if x.shape[0] == 1:
        if bias is None:
            torch.mm(x[0], weight_t, out=out[0])
        else:
            torch.addmm(bias, x[0], weight_t, out=out[0])
        return
    weights = weight_t.expand(x.shape[0], -1, -1)
    if bias is None:
        torch.bmm(x, weights, out=out)
    else:
        torch.baddbmm(bias, x, weights, out=out)


def accumulate(grad: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
    """``out (+)= grad^T @ x``, summed over all rows: [B, s, N], [B, s, K], [N, K]."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    torch.addmm(out, grad.t(), x, beta=0 if first else 1, out=out)


def add(parts: Sequence[Tensor], out: Tensor) -> None:
    """Sum in the order of ``parts``, 16-bit floats in fp32, rounded once. All on the host and contiguous.

    ``out`` may be one of the parts.
    """
    if out.numel():
        with shown("pycomm::sum"):
            _C.reduce(dtype_name(out.dtype), "sum", [part.data_ptr() for part in parts], [out.data_ptr()], out.numel())


def shown(name: str) -> AbstractContextManager[object]:
    """A span of that name in the traces of torch.profiler; costs next to nothing while there is none."""
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else _NOT_SHOWN


def nothing() -> None:
    """For who has nothing else to do meanwhile."""
