"""Registration of pycomm's differentiable operators with torch.library.

Through ``Library.define`` and ``impl``, which cost about a third of ``torch.library.custom_op`` a call. Groups are
passed by name (``groups.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["define"]

_library = torch.library.Library("pycomm", "FRAGMENT")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define ``pycomm::<schema>`` and return the callable operator.

    Args:
        schema: as torch.library takes it, without the namespace.
        implementation: for CPU and CUDA tensors; below autograd, so it may write into what it makes.
        fake: shapes and dtypes of the results, for tracing.
        setup_context, backward: the gradient, as ``torch.library.register_autograd`` takes them; None: has none.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"pycomm::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"pycomm::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.pycomm, name).default
