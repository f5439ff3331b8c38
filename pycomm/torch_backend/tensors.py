"""What torch.distributed hands over and what a communicator takes: layouts, dtypes, reduce operators.

A communicator takes contiguous tensors on its device, of nearly every dtype. Others are laid out contiguously first,
and copied back when the operation is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.distributed import ReduceOp

__all__ = ["Finish", "combine", "flat", "kind_of", "landing", "operator", "reduced", "source", "spread", "together"]

# What is left to do when the operation is over; None: nothing.
Finish = Callable[[], None] | None

_NAMES = {
    ReduceOp.SUM: "sum",
    ReduceOp.AVG: "avg",
    ReduceOp.MIN: "min",
    ReduceOp.MAX: "max",
    ReduceOp.PRODUCT: "prod",
    ReduceOp.PREMUL_SUM: "sum",  # of inputs that `reduced` has multiplied
}
_BOOL_NAMES = _NAMES | {ReduceOp.BOR: "max", ReduceOp.BAND: "min"}
_BITWISE = {
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}


def kind_of(op: ReduceOp) -> ReduceOp.RedOpType:
    """The operator without its factor, which can be looked up."""
    return op.op  # type: ignore[attr-defined, no-any-return]


def source(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of ``tensor``, to be read: its own memory if a communicator takes it, a copy otherwise."""
    tensor = _as_called(tensor)
    return tensor if _is_dense(tensor) else _dense(tensor)


def landing(tensor: torch.Tensor) -> tuple[torch.Tensor, Finish]:
    """Where what is meant for ``tensor`` arrives, with its contents of now, and what brings it there."""
    tensor = _as_called(tensor)
    if _is_dense(tensor):
        return tensor, None
    dense = _dense(tensor)
    return dense, partial(_copy, tensor, dense)


def reduced(tensor: torch.Tensor, op: ReduceOp) -> tuple[torch.Tensor, Finish]:
    """As :func:`landing`, for a tensor that ``op`` reduces; multiplied already if the operator says so."""
    if kind_of(op) == ReduceOp.PREMUL_SUM:
        tensor = _as_called(tensor)
        with torch.no_grad():
            # As NCCL does: every rank's factor, and the product rounded to the tensor's dtype.
            scaled = torch.mul(_dense(tensor), op.factor).to(tensor.dtype)
        return scaled, partial(_copy, tensor, scaled)
    return landing(tensor)


def operator(op: ReduceOp, dtype: torch.dtype) -> str | None:
    """The communicator's name of ``op`` over ``dtype``; None: a bitwise one, which :func:`combine` does.

    Raises:
        ValueError: it has no meaning there.
    """
    kind = kind_of(op)
    name = _BOOL_NAMES.get(kind) if dtype is torch.bool else _NAMES.get(kind)
    if name is None and (kind not in _BITWISE or dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"ReduceOp.{kind.name} over {dtype} has no meaning")
    if dtype.is_complex and name not in ("sum", "avg"):
        raise ValueError(f"ReduceOp.{kind.name} over {dtype} has no meaning: complex numbers have no order")
    return name


def combine(target: torch.Tensor, parts: torch.Tensor, op: ReduceOp) -> None:
    """Bitwise ``op`` over dim 0 of ``parts`` [ranks, *shape], in rank order, into ``target`` [*shape]."""
    _used_here(parts)
    function = _BITWISE[kind_of(op)]
    total = parts[0].clone()
    for part in parts[1:]:
        function(total, part, out=total)
    _copy(target, total)


def together(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """All elements of ``tensors`` one after the other in new memory [total], and how many each has there."""
    sources = [flat(source(tensor)) for tensor in tensors]
    with torch.no_grad():
        return torch.cat(sources), [part.numel() for part in sources]


def spread(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int], Finish]:
    """Memory [total] for the elements of ``tensors``, how many each has, and what brings them there."""
    landings = [landing(tensor) for tensor in tensors]
    wires = [wire for wire, _ in landings]
    counts = [wire.numel() for wire in wires]
    arriving = wires[0].new_empty(sum(counts))

    def finish() -> None:
        _used_here(arriving)
        for wire, part in zip(wires, arriving.split(counts), strict=True):
            _copy(wire, part.view(wire.shape))
        for _, done in landings:
            if done is not None:
                done()

    return arriving, counts, finish


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous ``tensor`` as [N]."""
    return tensor.detach().view(-1)


def _as_called(tensor: torch.Tensor) -> torch.Tensor:
    """The complex tensor of which torch.distributed hands over the pairs of real numbers, so that ranks compare what
    their callers have. (Not under inference_mode, where torch does not tell that a tensor is a view.)"""
    base = tensor._base if tensor.dim() and tensor.shape[-1] == 2 else None
    if base is None or not base.is_complex() or not tensor.is_floating_point():
        return tensor
    whole = torch.view_as_complex(tensor.detach())
    return whole if whole.dim() else whole.view(1)


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if it is laid out contiguously, else its contents in new memory that is.

    Raises:
        ValueError: not dense.
    """
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"the back end pycomm takes dense tensors, not {tensor.layout}: pass tensor.to_dense(), or for an "
            f"embedding's gradients sparse=False"
        )
    with torch.no_grad():
        return tensor.resolve_conj().resolve_neg().contiguous()


def _copy(target: torch.Tensor, contents: torch.Tensor) -> None:
    _used_here(target, contents)
    with torch.no_grad():
        target.detach().copy_(contents)


def _used_here(*tensors: torch.Tensor) -> None:
    """On a GPU, whoever waits for a call finishes it on a stream of its own: memory is not used again before that."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
