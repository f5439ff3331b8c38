"""What a communicator's products do: each product of a layer with its communication, forward and backward.

A product is added as two methods here, in ``plain.py`` (and where another implementation does it better), and as one
entry in ``operators.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Gradients", "Products"]

Gradients = tuple[Tensor, Tensor, Tensor]  # of x, weight and bias; one that nobody needs is empty


class Products(Protocol):
    """The products of one communicator. Every method is collective where its direction communicates.

    x is […, rows, K], weight [N, K] with any strides, bias [N] and added once, ``grad`` contiguous and of the result's
    shape. Partial products are added in rank order, 16-bit floats in fp32 with one rounding. Results are tensors of the
    caller, never views of memory that ranks share. Every rank needs the same gradients. ``overlap`` changes no bit.

    Raises:
        MismatchError: where ranks compare their calls beforehand: another rank called something else.
        ValueError: ``sizes`` is not what the ranks have.
    """

    def all_gather_matmul(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int] | None, overlap: bool
    ) -> Tensor:
        """``cat(x over ranks, dim=-2) @ weight.T + bias``. ``sizes``: rows of every rank; None: the ranks ask."""
        ...

    def all_gather_matmul_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        sizes: Sequence[int] | None,
        overlap: bool,
        need_x: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> Gradients:
        """x is gathered again for the weight's gradient; its own is summed over ranks and scattered."""
        ...

    def matmul_reduce_scatter(self, x: Tensor, weight: Tensor, bias: Tensor | None, overlap: bool) -> Tensor:
        """This rank's rows of ``x @ weight.T`` summed over ranks, by the rule of ``torch.chunk``, ``+ bias``."""
        ...

    def matmul_reduce_scatter_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, overlap: bool, need_x: bool, need_weight: bool, need_bias: bool
    ) -> Gradients:
        """``grad`` is gathered, once. The bias's gradient is that of all rows, with the same bits on every rank."""
        ...

    def matmul_all_reduce(self, x: Tensor, weight: Tensor, bias: Tensor | None, overlap: bool) -> Tensor:
        """``x @ weight.T`` summed over ranks, ``+ bias``, with the same bits on every rank."""
        ...

    def matmul_all_reduce_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, overlap: bool, need_x: bool, need_weight: bool, need_bias: bool
    ) -> Gradients:
        """No communication: ``grad`` is the same on every rank."""
        ...

    def copy_matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None, overlap: bool) -> Tensor:
        """``x @ weight.T + bias`` of an x that every rank has; no communication."""
        ...

    def copy_matmul_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, overlap: bool, need_x: bool, need_weight: bool, need_bias: bool
    ) -> Gradients:
        """x's gradient is summed over ranks."""
        ...
