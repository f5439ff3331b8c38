"""Clipping by the global norm, in one pass: the averages' norms were taken while they were computed.

Ref: Pascanu et al., "On the difficulty of training recurrent neural networks" (2013).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycomm import _C
from pycomm.annotations import check_type, check_types
from pycomm.data_parallel.engine import GradientEngine
from pycomm.data_parallel.gradients import block_norms, check_on_host
from pycomm.data_parallel.layout import TrainedParam, lay_out, num_blocks
from pycomm.data_parallel.module import DataParallel
from pycomm.data_parallel.partial import PartialGradient
from pycomm.errors import PycommError
from pycomm.mesh import Mesh

_log = logging.getLogger("pycomm")
_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it
_NUM_NAMED = 5


@check_types()
def clip_grad_norm_(
    parameters: DataParallel | Iterable[DataParallel] | Iterable[Tensor],
    max_norm: float,
    mesh: Mesh | None = None,
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
    if wrapped and len(wrapped) != len(given):
        raise TypeError("clip_grad_norm_ takes wrapped modules or parameters, not both at once")
    for item in given:
        check_type("clip_grad_norm_: an element of parameters", item, DataParallel if wrapped else Tensor)
    found = _of_averages(wrapped) if wrapped else [_of_tensors([item for item in given if isinstance(item, Tensor)])]
    norms = []
    for gradients in found:
        for trained in gradients.params:
            if not _counts(trained.param, mesh):
                gradients.table[trained.blocks] = 0
        scale = 1.0 if gradients.engine is None else gradients.engine.step.grad_scale
        norms.append(_C.sum_in_order(gradients.table.data_ptr(), gradients.table.numel()) ** 0.5 * scale)
    norm = _over_model(math.hypot(*norms), mesh)
    factor = min(1.0, max_norm / (norm + _EPS)) if math.isfinite(norm) else 1.0
    for gradients in found:
        if gradients.engine is not None and gradients.engine.stage is not None:
            gradients.engine.step.clipped(norm, factor)
        elif factor < 1:
            torch._foreach_mul_([p.param.grad for p in gradients.params if p.param.grad is not None], factor)
    if not math.isfinite(norm):
        _say_non_finite(norm, [name for gradients in found for name in gradients.non_finite()], error_if_nonfinite)
    is_double = any(p.family.grad_dtype == torch.float64 for gradients in found for p in gradients.params)
    return torch.tensor(norm, dtype=torch.float64 if is_double else torch.float32)


@dataclass(eq=False)
class _Gradients:
    """What a norm is taken of: the averages of one DataParallel, or gradients that are given."""

    table: Tensor  # of squared norms
    params: Sequence[TrainedParam]
    engine: GradientEngine | None = None  # of averages

    def non_finite(self) -> list[str]:
        """The parameters whose gradients have an infinity or a NaN."""
        is_finite = torch.isfinite(self.table)
        names = [p.name for p in self.params if not is_finite[p.blocks].all()]
        return names if self.engine is None else [repr(name) for name in names]


def _of_averages(wrapped: Sequence[DataParallel]) -> list[_Gradients]:
    """Those of every wrapper. Collective."""
    engines = [ddp._engine for ddp in wrapped]
    for engine in engines:
        _check_on_host((repr(trained.name), trained.param) for trained in engine.gradients.params)
    return [_Gradients(engine.gradients.norm_table(), engine.gradients.params, engine) for engine in engines]


def _of_tensors(given: Sequence[Tensor]) -> _Gradients:
    """Those that the parameters have, whole."""
    with_grad = [(param, param.grad) for param in given if param.grad is not None]
    for _, grad in with_grad:
        if isinstance(grad, PartialGradient):
            grad.refuse("clip_grad_norm_ of parameters")
        if grad.layout != torch.strided:
            raise ValueError("the norm of a sparse gradient is not defined here; build its layer with sparse=False")
    _check_on_host((f"gradient number {number}", grad) for number, (_, grad) in enumerate(with_grad))
    named = [
        (f"number {number} of {len(with_grad)}, {list(param.shape)}", param, grad.dtype)
        for number, (param, grad) in enumerate(with_grad)
    ]
    params = lay_out(named, 0, 1)
    table = torch.zeros(sum(num_blocks(grad.numel()) for _, grad in with_grad), dtype=torch.float64)
    for trained, (_, grad) in zip(params, with_grad, strict=True):
        block_norms(trained.in_memory_order(grad), [trained.run(trained.shard)], table)
    return _Gradients(table, params)


def _check_on_host(tensors: Iterable[tuple[str, Tensor]]) -> None:
    check_on_host(
        "clip_grad_norm_", tensors, "torch.nn.utils.clip_grad_norm_ takes gradients that are not divided there"
    )


def _counts(param: Tensor, mesh: Mesh | None) -> bool:
    """Whether this rank counts the parameter for the model: its owner alone does."""
    if mesh is None:
        return True
    is_owner = mesh.tp.rank == 0 or getattr(param, "is_part", False)
    return is_owner and not getattr(param, "is_counted_elsewhere", False)


def _over_model(norm: float, mesh: Mesh | None) -> float:
    """The norm over all parts of the model. Collective over the mesh's tp and pp."""
    if mesh is None:
        return norm
    square = torch.tensor([norm * norm], dtype=torch.float64)
    for axis in (mesh.tp, mesh.pp):
        axis.all_reduce(square)
    return math.sqrt(float(square))


def _say_non_finite(norm: float, names: list[str], error: bool) -> None:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    text = f"the norm of the gradients is {norm}; not finite: {', '.join(names[:_NUM_NAMED]) or 'on other ranks'}{more}"
    if error:
        raise PycommError(text)
    _log.warning("%s; nothing was scaled", text)
