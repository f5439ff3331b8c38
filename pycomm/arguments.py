"""What callers hand to a collective, checked before anything is sent: tensors, parts of tensors, and their overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["check_apart", "check_numel", "even_counts", "split_counts", "tensor_on"]


def tensor_on(device: torch.device, tensor: Any, name: str = "the tensor") -> torch.Tensor:
    """A contiguous torch tensor on ``device`` that shares memory with ``tensor``, which may be any DLPack array.

    Raises:
        TypeError: neither a tensor nor an array that speaks DLPack.
        ValueError: not contiguous, or elsewhere.
    """
    if not isinstance(tensor, torch.Tensor):
        if not hasattr(tensor, "__dlpack__"):
            raise TypeError(f"{name}: {type(tensor).__name__} is neither a tensor nor an array that speaks DLPack")
        tensor = torch.from_dlpack(tensor)
    assert isinstance(tensor, torch.Tensor)
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, this communicator works on {device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} is not contiguous (shape {tuple(tensor.shape)}, strides {tensor.stride()}): "
            f"pass tensor.contiguous() and copy the result back, or lay the tensor out contiguously"
        )
    return tensor


def even_counts(tensor: torch.Tensor, world_size: int, name: str) -> list[int]:
    """Elements of each rank's part where all are equal.

    Raises:
        ValueError: the number of elements is no multiple of ``world_size``.
    """
    count, rest = divmod(tensor.numel(), world_size)
    if rest != 0:
        raise ValueError(
            f"{name} has {tensor.numel()} elements, which {world_size} ranks cannot share evenly: "
            f"pass {name}_splits, or pad it"
        )
    return [count] * world_size


def split_counts(tensor: torch.Tensor, splits: Sequence[int] | None, world_size: int, name: str) -> list[int]:
    """Elements of each rank's part of ``tensor``, from counts along dim 0; None: equal parts.

    Raises:
        ValueError: they are not one a rank, are negative, or do not add up to dim 0.
    """
    if splits is None:
        return even_counts(tensor, world_size, name)
    counts = [int(count) for count in splits]
    if len(counts) != world_size:
        raise ValueError(f"{name}_splits has {len(counts)} counts, it needs one for each of the {world_size} ranks")
    if any(count < 0 for count in counts):
        raise ValueError(f"{name}_splits={counts}: a count is negative")
    if tensor.dim() == 0:
        raise ValueError(f"{name} has no dim 0 to split: pass {name}.view(1)")
    if sum(counts) != tensor.shape[0]:
        raise ValueError(f"{name}_splits={counts} add up to {sum(counts)}, dim 0 of {name} has {tensor.shape[0]}")
    row = math.prod(tensor.shape[1:])
    return [count * row for count in counts]


def check_numel(tensor: torch.Tensor, expected: int, name: str) -> None:
    """ValueError unless ``tensor`` has ``expected`` elements."""
    if tensor.numel() != expected:
        raise ValueError(f"{name} has {tensor.numel()} elements (shape {tuple(tensor.shape)}), it needs {expected}")


def check_apart(output: torch.Tensor, input: torch.Tensor, in_place: tuple[torch.Tensor, int, int] | None) -> None:
    """ValueError unless both have one dtype and do not overlap.

    Args:
        in_place: (whole, start, count): the one overlap that is allowed, the smaller tensor being just these elements
            of the larger, ``whole``. None: no overlap is.
    """
    if output.dtype != input.dtype:
        raise ValueError(f"output is {output.dtype}, input is {input.dtype}: both need one dtype")
    size = output.element_size()
    begin, end = output.data_ptr(), output.data_ptr() + output.numel() * size
    input_begin, input_end = input.data_ptr(), input.data_ptr() + input.numel() * size
    if end <= input_begin or input_end <= begin or begin == end or input_begin == input_end:
        return
    if in_place is None:
        raise ValueError("output and input overlap: pass separate memory")
    whole, start, count = in_place
    part = input if whole is output else output
    if part.data_ptr() != whole.data_ptr() + start * size or part.numel() != count:
        raise ValueError(
            f"output and input overlap: they may only where the smaller is this rank's own part of the larger, "
            f"which starts at element {start}"
        )
