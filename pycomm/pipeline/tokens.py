"""Tokens: what travels ahead of a tensor from one stage to another, and describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pycomm.arguments import MOVED
from pycomm.communicator import Work

__all__ = ["TOKEN", "Arrived", "Link", "Token", "check_sendable", "pack", "receiving_stage", "sending_stage", "unpack"]

_MAX_DIMS = 8
TOKEN = 5 + _MAX_DIMS  # int64: slot, whether the tensor follows as a message, rows, dtype, dimensions, sizes

Link = tuple[str, int]  # kind of the receive and the stage that receives


class Token(NamedTuple):
    """A tensor, its micro-batch's rows, the slot that it takes, and whether it is there or follows as a message."""

    slot: int
    is_apart: bool
    rows: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass
class Arrived:
    """A tensor that came over ``link``; its memory may be a slot of the sender's.

    With ``work`` it comes on another stream, and ``work.wait()`` stands before its use.
    """

    tensor: Tensor
    token: Token
    link: Link
    work: Work | None = None


def pack(tensor: Tensor, rows: int, *, slot: int = 0, is_apart: bool = True) -> list[int]:
    """The token of ``tensor`` as [TOKEN] integers."""
    padding = [0] * (_MAX_DIMS - tensor.ndim)
    return [slot, int(is_apart), rows, MOVED.index(tensor.dtype), tensor.ndim, *tensor.shape, *padding]


def unpack(numbers: list[int]) -> Token:
    slot, is_apart, rows, dtype, ndim, *sizes = numbers
    return Token(slot, bool(is_apart), rows, MOVED[dtype], torch.Size(sizes[:ndim]))


def check_sendable(tensor: object, what: str) -> None:
    """Raise TypeError or ValueError, with ``what`` in front, unless a token can describe ``tensor``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} is {type(tensor).__name__}: a stage takes one tensor and returns one")
    if tensor.dtype not in MOVED or tensor.ndim > _MAX_DIMS:
        raise ValueError(f"{what} is {tensor.dtype} with {tensor.ndim} dimensions: it cannot be sent to another stage")


def sending_stage(link: Link) -> int:
    kind, stage = link
    return stage - 1 if kind == "RECV_F" else stage + 1


def receiving_stage(link: Link) -> int:
    return link[1]
