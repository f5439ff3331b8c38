"""Checks of arguments that are no call's: those the extension checks itself (csrc/bindings/bind_collectives.cpp)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import UnionType
from typing import Any

import torch

from pycomm import _C

__all__ = [
    "MOVED",
    "REDUCED",
    "checked_int",
    "checked_shape",
    "checked_timeout",
    "checked_type",
    "dtype_name",
    "tensor_on",
]

# The dtypes that calls move, and those that have arithmetic of their own. Reductions also take bool, by "or" (sum, max)
# and "and" (prod, min), and complex numbers, as pairs (sum, avg).
MOVED: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in _C.DTYPES if hasattr(torch, name))
REDUCED = MOVED[: _C.NUM_NUMBER_TYPES]
_MOST_BYTES = 2**63 - 1


def tensor_on(device: torch.device, tensor: Any, name: str = "the tensor") -> torch.Tensor:
    """A contiguous torch tensor on ``device`` that shares memory with ``tensor``, which may be any DLPack array.

    Raises:
        TypeError: neither a tensor nor an array that speaks DLPack.
        ValueError: not contiguous, elsewhere, or of a dtype that no call takes.
    """
    return _C.checked_tensor(tensor, name, -1 if device.type == "cpu" else device.index or 0)


def checked_timeout(timeout_s: float) -> float:
    """``timeout_s`` as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive, or longer than 1e9 seconds, inf among them: every wait is bounded.
    """
    return _C.checked_timeout(timeout_s)


def checked_int(value: Any, name: str, *, or_none: bool = False) -> int:
    """``value`` as an int of 64 bits.

    Args:
        or_none: the text of an error says that None may be given, too.

    Raises:
        TypeError, ValueError: it is none; says what to write.
    """
    try:
        number = operator.index(value)
    except TypeError:
        expected = "an int, or None" if or_none else "an int"
        raise TypeError(f"{name} is {value!r}: it is {expected}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} is {number}: it is an int of 64 bits")
    return number


def checked_type(value: Any, kind: type | UnionType, name: str, expected: str) -> None:
    """TypeError unless ``value`` is a ``kind``, which the error calls ``expected``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}: it is {expected}")


def checked_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """``shape`` of new memory of ``dtype``.

    Raises:
        TypeError: a size is no int, or ``dtype`` is none of torch.
        ValueError: a size is negative, the whole has more bytes than an address space, or no call moves ``dtype``.
    """
    checked_type(dtype, torch.dtype, "dtype", "one of torch's, such as torch.float32")
    if dtype not in MOVED:
        names = ", ".join(_C.DTYPES)
        raise ValueError(f"empty: dtype {dtype_name(dtype)} is not supported; it is one of {names}")
    num_bytes = dtype.itemsize
    sizes = []
    for size in shape:
        try:
            sizes.append(operator.index(size))
        except TypeError:
            raise TypeError(f"empty: size {size!r} is no int; sizes are given one by one, as in empty(2, 3)") from None
        num_bytes *= sizes[-1]
    if any(size < 0 for size in sizes):
        raise ValueError(f"empty: negative size in {tuple(sizes)}")
    if num_bytes > _MOST_BYTES:
        raise ValueError(f"empty: {tuple(sizes)} of {dtype_name(dtype)} are {num_bytes} bytes, more than 2**63 - 1")
    return tuple(sizes)


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without "torch."."""
    return str(dtype).removeprefix("torch.")
