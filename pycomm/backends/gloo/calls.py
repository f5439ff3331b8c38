"""What a rank says of a call before it takes part in it: a fixed-size struct that all ranks compare."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pycomm import _C
from pycomm.arguments import dtype_name

__all__ = ["DTYPES", "Call", "call_of", "describe_message", "hash_of_counts"]

_STRUCT = struct.Struct("<QBBBBiQQ")  # seq, kind, dtype, op, route, root, count, splits
_OPS = ("sum", "avg", "min", "max", "prod")
_KINDS = (
    "barrier",
    "all_reduce",
    "broadcast",
    "empty",
    "split",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "reduce",
    "gather",
    "scatter",
    "agree",
)
DTYPES = _C.DTYPES


@dataclass(frozen=True)
class Call:
    """One collective call of one rank. All fields must be equal on all ranks.

    Attributes:
        splits: a hash of the ranks' parts where they differ, else 0; all_to_all: 1 if by splits;
            agree: the bytes of a row.
    """

    seq: int
    kind: str
    dtype: str = "uint8"
    op: str = "sum"
    root: int = 0
    count: int = 0
    splits: int = 0

    def numbered(self, seq: int) -> Call:
        return replace(self, seq=seq)

    def pack(self) -> bytes:
        numbers = _KINDS.index(self.kind), DTYPES.index(self.dtype), _OPS.index(self.op)
        return _STRUCT.pack(self.seq, *numbers, 0, self.root, self.count, self.splits)

    @classmethod
    def unpack(cls, row: bytes) -> Call:
        seq, kind, dtype, op, _, root, count, splits = _STRUCT.unpack(row)
        return cls(seq, _KINDS[kind], DTYPES[dtype], _OPS[op], root, count, splits)

    def __str__(self) -> str:
        """As the host transport describes its calls."""
        elements = f"{self.dtype}[{self.count}]"
        root = f"root={self.root}"
        uneven = f", uneven splits with hash {self.splits}" if self.splits else ""
        arguments = {
            "agree": f"row[{self.count}]",
            "all_reduce": f"{self.op}, {elements}",
            "broadcast": f"{root}, {elements}",
            "empty": f"{self.count} bytes",
            "reduce_scatter": f"{self.op}, {elements}{uneven}",
            "all_gather": f"{elements}{uneven}",
            "all_to_all": f"{self.dtype} by splits" if self.splits else elements,
            "reduce": f"{root}, {self.op}, {elements}",
            "gather": f"{root}, {elements} in all",
            "scatter": f"{root}, {elements} in all",
        }
        return f"{self.kind}({arguments.get(self.kind, '')})"


def call_of(kind: str, tensor: torch.Tensor, **fields: Any) -> Call:
    """A call on ``tensor``; ``fields`` as those of :class:`Call`."""
    return Call(0, kind, dtype_name(tensor.dtype), **{"count": tensor.numel(), **fields})


def hash_of_counts(counts: Sequence[int]) -> int:
    """0 if all are equal; never 0 otherwise."""
    if len(set(counts)) <= 1:
        return 0
    return zlib.crc32(struct.pack(f"<{len(counts)}Q", *counts)) | 1 << 32


def describe_message(is_send: bool, peer: int | None, tag: int, dtype: str, count: int) -> str:
    """As the host transport describes its messages."""
    side = f"send(dst={peer}" if is_send else f"recv(src={'any' if peer is None else peer}"
    return f"{side}, tag={tag}, {dtype}[{count}])"
