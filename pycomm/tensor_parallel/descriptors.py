"""What a rank calls, as numbers that the ranks of a fused product show each other before one uses another's data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pycomm.errors import MismatchError

__all__ = ["ALL_REDUCE", "GATHER", "REDUCE_SCATTER", "describe", "dtype_code", "same_calls"]

GATHER, REDUCE_SCATTER, ALL_REDUCE = range(3)
_CALLS = ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def dtype_code(tensor: Tensor) -> int:
    """The number of the dtype in a descriptor.

    Raises:
        ValueError: fused products do not take it.
    """
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"fused products take float32, float64, float16 and bfloat16, not {tensor.dtype}")
    return _DTYPES.index(tensor.dtype)


def describe(words: Sequence[int]) -> str:
    """The call that a descriptor stands for."""
    kind, dtype, batch, rows, width, *_ = words
    return f"{_CALLS[kind]}({str(_DTYPES[dtype]).removeprefix('torch.')}[{batch}, {rows}, {width}])"


def same_calls(
    group: str, found: Sequence[tuple[int, ...]], describe: Callable[[Sequence[int]], str], ignore: int | None = None
) -> None:
    """Check that all descriptors, by rank, are equal, but for the word ``ignore``.

    Raises:
        MismatchError: they are not. All ranks see the same, so all raise it.
    """
    keys = {words if ignore is None else words[:ignore] + words[ignore + 1 :] for words in found}
    if len(keys) > 1:
        calls = {rank: describe(words) for rank, words in enumerate(found)}
        text = "; ".join(f"rank {rank} {call}" for rank, call in calls.items())
        raise MismatchError(f"ranks of group {group!r} called different things: {text}", calls=calls)
