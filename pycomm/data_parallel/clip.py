"""Clipping by the global norm, in one pass: the averages' norms were taken while they were computed.

Ref: Pascanu et al., "On the difficulty of training recurrent neural networks" (2013).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pycomm.annotations import check_type, check_types
from pycomm.communicator import Communicator
from pycomm.data_parallel.module import DataParallel
from pycomm.data_parallel.norms import check_on_host, non_finite_names, norms_of_tensor, total_norm
from pycomm.data_parallel.partial import PartialGradient
from pycomm.data_parallel.shards import num_blocks
from pycomm.errors import PycommError

_log = logging.getLogger("pycomm")
_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it
_NUM_NAMED = 5


class ModelAxes(Protocol):
    """The axes of a mesh along which one model is divided."""

    @property
    def tp(self) -> Communicator: ...
    @property
    def pp(self) -> Communicator: ...


@check_types()
def clip_grad_norm_(
    parameters: DataParallel | Iterable[DataParallel] | Iterable[Tensor],
    max_norm: float,
    mesh: ModelAxes | None = None,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale gradients so that their global 2-norm is at most ``max_norm``. Returns the norm before.

    The norm has the same bits on every rank, for every ``bucket_mb`` and stage of :class:`pycomm.ShardedAdamW`: fp64
    sums of blocks of 1,024 elements, added in order. Given a :class:`pycomm.DataParallel`, call it on every rank; the
    gradients are not read again if nobody has changed them since backward. If a ShardedAdamW belongs to it, ``.grad``
    stays as it is, and the next step scales on the way.

    If the norm is infinite or NaN, nothing is scaled, a warning names the parameters, and a ShardedAdamW leaves out its
    next step.

    Args:
        parameters: a DataParallel, or those of all stages that this rank has of a pipeline; or parameters whose
            ``.grad`` is complete on this rank.
        max_norm: positive.
        mesh: of a model that is divided over ranks: the norm is that of all its parts, on ``mesh.tp`` and ``mesh.pp``.
            A parameter is taken to be the same on all ranks of ``mesh.tp``, and counts once, unless it has the
            attribute ``is_part``, as what parallel layers cut has. One that is a copy, as pipeline stages have of tied
            weights, does not count if it has the attribute ``is_counted_elsewhere``.
        error_if_nonfinite: raise instead of the warning.

    Returns:
        [] float32, or float64 if a gradient is.

    Raises:
        PycommError: ``error_if_nonfinite``; on every rank, names the parameters. Or ``.grad`` of a parameter has this
            rank's part alone, under ZeRO: pass the DataParallel.
        NotImplementedError: gradients are not on the CPU; nothing was sent.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}: it must be positive")
    if isinstance(parameters, nn.Module) and not isinstance(parameters, DataParallel):
        raise TypeError(
            f"clip_grad_norm_: parameters is a {type(parameters).__name__}; it must be its DataParallel, or "
            "module.parameters() where .grad is complete on this rank"
        )
    given = [parameters] if isinstance(parameters, (DataParallel, Tensor)) else list(parameters)
    wrapped = [item for item in given if isinstance(item, DataParallel)]
    if wrapped:
        if len(wrapped) != len(given):
            raise TypeError("clip_grad_norm_ takes wrapped modules or parameters, not both at once")
        return _clip_averages(wrapped, max_norm, mesh, error_if_nonfinite)
    for item in given:
        check_type("clip_grad_norm_: an element of parameters", item, Tensor)
    params = [param for param in given if isinstance(param, Tensor) and param.grad is not None]
    grads = [param.grad for param in params if param.grad is not None]
    for grad in grads:
        if isinstance(grad, PartialGradient):
            grad.refuse("clip_grad_norm_ of parameters")
    _check_on_host((f"gradient number {number}", grad) for number, grad in enumerate(grads))
    first_blocks = [0]
    for param in params:
        first_blocks.append(first_blocks[-1] + num_blocks(param.numel()))
    table = torch.zeros(first_blocks[-1], dtype=torch.float64)
    for param, grad, first_block in zip(params, grads, first_blocks, strict=False):
        if _counts(param, mesh):
            norms_of_tensor(grad, first_block, table)
    norm = _over_model(total_norm(table), mesh)
    if math.isfinite(norm):
        factor = _factor(norm, max_norm)
        if factor < 1:
            torch._foreach_mul_(grads, factor)
    else:
        named = [
            f"number {number} of {len(params)}, {list(param.shape)}"
            for number, (param, begin) in enumerate(zip(params, first_blocks, strict=False))
            if not torch.isfinite(table[begin : begin + num_blocks(param.numel())]).all()
        ]
        _say_non_finite(norm, named, error_if_nonfinite)
    return _as_tensor(norm, [grad.dtype for grad in grads])


def _clip_averages(
    wrapped: Sequence[DataParallel], max_norm: float, mesh: ModelAxes | None, error_if_nonfinite: bool
) -> Tensor:
    engines = [ddp._engine for ddp in wrapped]
    for engine in engines:
        _check_on_host((repr(slot.name), slot.param) for slot in engine.gradients.slots)
    tables = []
    for engine in engines:
        table = engine.gradients.norm_table()
        for slot in engine.gradients.slots:
            if not _counts(slot.param, mesh):
                table[slot.first_block : slot.first_block + num_blocks(slot.param.numel())] = 0
        tables.append(table)
    norms = [total_norm(table) * engine.grad_scale for table, engine in zip(tables, engines, strict=True)]
    norm = _over_model(norms[0] if len(norms) == 1 else math.hypot(*norms), mesh)
    for engine in engines:
        engine.norm_is_finite = math.isfinite(norm)
        if engine.norm_is_finite:
            factor = _factor(norm, max_norm)
            if engine.scales_in_step:
                engine.grad_scale *= factor
            elif factor < 1:
                engine.gradients.scale(factor)
    if not math.isfinite(norm):
        slots_and_tables = zip((engine.gradients.slots for engine in engines), tables, strict=True)
        named = [repr(name) for slots, table in slots_and_tables for name in non_finite_names(slots, table)]
        _say_non_finite(norm, named, error_if_nonfinite)
    return _as_tensor(norm, [family.grad_dtype for engine in engines for family in engine.gradients.families])


def _check_on_host(tensors: Iterable[tuple[str, Tensor]]) -> None:
    check_on_host(
        "clip_grad_norm_", tensors, "torch.nn.utils.clip_grad_norm_ takes gradients that are not divided there"
    )


def _counts(param: Tensor, mesh: ModelAxes | None) -> bool:
    """Whether this rank counts the parameter for the model: its owner alone does."""
    if mesh is None:
        return True
    is_owner = mesh.tp.rank == 0 or getattr(param, "is_part", False)
    return is_owner and not getattr(param, "is_counted_elsewhere", False)


def _over_model(norm: float, mesh: ModelAxes | None) -> float:
    """The norm over all parts of the model. Collective over the mesh's tp and pp."""
    if mesh is None:
        return norm
    square = torch.tensor([norm * norm], dtype=torch.float64)
    for axis in (mesh.tp, mesh.pp):
        axis.all_reduce(square)
    return math.sqrt(float(square))


def _factor(norm: float, max_norm: float) -> float:
    return min(1.0, max_norm / (norm + _EPS))


def _say_non_finite(norm: float, names: list[str], error: bool) -> None:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    text = f"the norm of the gradients is {norm}; not finite: {', '.join(names[:_NUM_NAMED]) or 'on other ranks'}{more}"
    if error:
        raise PycommError(text)
    _log.warning("%s; nothing was scaled", text)


def _as_tensor(norm: float, dtypes: list[torch.dtype]) -> Tensor:
    return torch.tensor(norm, dtype=torch.float64 if torch.float64 in dtypes else torch.float32)
