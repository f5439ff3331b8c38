"""``.grad`` under ZeRO: tensors that say so where a rank's part would be taken for the whole gradient.

torch's own tools read ``.grad`` as if it were complete. Under stages 1 and 2 that goes wrong without an error: a norm
is taken of one rank's shard and of leftovers, or of nothing. So ``.grad`` holds tensors of the types below, which
raise in such functions and name what to call instead. GradScaler's search for infinities needs no whole gradients,
only an answer that is the same on all ranks: it gets one.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from pycomm.data_parallel.layout import TrainedParam
from pycomm.errors import PycommError

if TYPE_CHECKING:
    from pycomm.data_parallel.gradients import Gradients

_REDUCTIONS = {"sum", "mean", "std", "var", "max", "min", "amax", "amin", "_foreach_max", "_foreach_powsum"}
# What stands between .grad and a norm in code that takes norms by hand: its results are partial, too.
_STEPS_TO_NORMS = {"detach", "data", "to", "type", "float", "double", "abs", "square", "pow", "__pow__"}
# What code may ask of a gradient without reading or changing it, besides attributes such as shape and dtype.
_ABOUT_IT = {
    *("size", "dim", "stride", "storage_offset", "numel", "element_size", "is_floating_point", "is_complex"),
    *("is_contiguous", "data_ptr", "untyped_storage", "get_device", "detach", "detach_", "requires_grad_"),
    *("__len__", "__hash__"),
}
_VIEWS = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that read it
_ZERO = {"zero_", "_foreach_zero_"}


class PartialGradient(Tensor):
    """A gradient of which this rank's shard alone is averaged (stage 1). Results of operations are plain tensors."""

    trained: TrainedParam
    gradients: weakref.ref[Gradients]

    @classmethod
    def of(cls, memory: Tensor, trained: TrainedParam, gradients: weakref.ref[Gradients]) -> PartialGradient:
        """``memory`` as the gradient of ``trained``."""
        partial = memory.as_subclass(cls)
        partial.trained, partial.gradients = trained, gradients
        return partial

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._amp_foreach_non_finite_check_and_unscale_:
            return _unscale(*args, **kwargs)
        name: str = func.__name__
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]  # of the attribute
        first = next(_partial_in((args, kwargs)))
        first._check(name, is_attribute=func.__name__ == "__get__")
        if name in _ZERO and isinstance(first, AbsentGradient):
            return args[0]  # it has no memory; zero_grad() then tells its owner
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return cls.of(result, first.trained, first.gradients) if name in _STEPS_TO_NORMS else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def _check(self, name: str, *, is_attribute: bool) -> None:
        """Raise if the function or attribute takes the part for the whole."""
        if name in _REDUCTIONS or name.endswith("norm"):
            self.refuse(name)

    def refuse(self, what: str) -> NoReturn:
        """Raise the error of ``what``, which needs the whole gradient."""
        shard = self.trained.shard
        raise PycommError(
            f"{what}: of the gradient of {self.trained.name!r} this rank has the average of elements "
            f"{shard.begin} to {shard.end} alone, since a ShardedAdamW divides it. For norms and clipping call "
            "pycomm.clip_grad_norm_(ddp, max_norm); ddp.gradient_parts(param) gives this rank's part, to read or change"
        )


class AbsentGradient(PartialGradient):
    """Stands for a gradient that was averaged and is kept elsewhere (stage 2): shape and dtype, no values."""

    @classmethod
    def standing_for(cls, trained: TrainedParam, gradients: weakref.ref[Gradients]) -> AbsentGradient:
        like = trained.param
        memory = torch.zeros((), dtype=trained.family.grad_dtype, device=like.device).expand(like.shape)
        absent = cls.of(memory, trained, gradients)
        assert isinstance(absent, cls)
        return absent

    def _check(self, name: str, *, is_attribute: bool) -> None:
        is_fine = name not in _VIEWS if is_attribute else name in _ABOUT_IT or name in _ZERO
        if not is_fine:
            self.refuse(name)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentGradient({self.trained.name!r}, {list(self.shape)}, {self.dtype}: see ddp.gradient_parts(param))"


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, which is where models and functions of torch have them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, Mapping)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors_in(value)


def _partial_in(values: Any) -> Iterator[PartialGradient]:
    return (tensor for tensor in tensors_in(values) if isinstance(tensor, PartialGradient))


@torch.no_grad()
def _unscale(grads: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """What GradScaler calls: multiply by ``inv_scale``, and say in ``found_inf`` whether an entry is not finite.

    Collective: every rank does it to its parts, and all get the same answer.
    """
    parts = [grad for grad in grads if not isinstance(grad, PartialGradient)]
    comm = None
    for grad in _partial_in(list(grads)):
        owner = grad.gradients()
        if owner is None:
            raise PycommError(f"the DataParallel to which the gradient of {grad.trained.name!r} belongs is gone")
        comm = owner.comm
        parts += [part for _, part in owner.parts(grad.trained)]
    parts = [part for part in parts if part.numel() > 0]
    if parts:
        torch._amp_foreach_non_finite_check_and_unscale_(parts, found_inf, inv_scale)
    assert comm is not None
    comm.all_reduce(found_inf, op="max")
