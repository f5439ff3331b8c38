"""Registration of pycomm's differentiable operators with torch.library, and a short way to them for eager calls.

Through ``Library.define`` and ``impl``, which cost about a third of ``torch.library.custom_op`` a call. A
communicator is passed by its key.

A call goes through torch's dispatcher where somebody listens there: torch.compile and other tracers, dispatch modes,
functorch, tensor subclasses. Anyone else gets the same implementation and the same gradient through a plain
``autograd.Function``, which costs a third of the dispatcher's way through Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["define"]

_library = torch.library.Library("pycomm", "FRAGMENT")
_PLAIN = (Tensor, nn.Parameter)


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define ``pycomm::<schema>`` and return what calls it, with positional arguments.

    Args:
        schema: as torch.library takes it, without the namespace.
        implementation: for CPU and CUDA tensors; without autograd, so it may write into what it makes. It returns
            no views: torch refuses to let callers write into those.
        fake: shapes and dtypes of the results, for tracing.
        setup_context, backward: the gradient, as ``torch.library.register_autograd`` takes them; None: has none, and
            differentiating raises.

    Returns:
        A function; ``.operator`` is what the dispatcher knows.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"pycomm::{name}", fake, lib=_library)
    gradient = backward or _no_gradient(name)
    torch.library.register_autograd(f"pycomm::{name}", gradient, setup_context=setup_context, lib=_library)
    operator = getattr(torch.ops.pycomm, name).default
    function = _function(name, implementation, setup_context, gradient)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched(args):
            return operator(*args)
        if not torch.is_grad_enabled() or not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return implementation(*args)
        return function.apply(*args)

    call.operator = operator  # type: ignore[attr-defined]
    return call


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether something sees calls at the dispatcher."""
    return (
        is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(arg, Tensor) and type(arg) not in _PLAIN for arg in args)
    )


def _no_gradient(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"pycomm::{name} is a gradient, and has none itself: second gradients are not there")

    return refuse


def _function(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> Any:
    """An autograd.Function; profilers show its name."""

    def forward(ctx: Any, *args: Any) -> Any:
        out = implementation(*args)
        if setup_context is not None:
            setup_context(ctx, args, out)
        return out

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"pycomm::{name}", (torch.autograd.Function,), parts)
