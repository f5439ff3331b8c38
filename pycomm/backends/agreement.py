"""How ranks agree: every rank shows all others a small row, and does something only if it succeeds on every rank.

Back ends have :meth:`pycomm.backends.Backend.agree` for rows of bytes; here is what is made of it, for all of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import struct
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeVar

from pycomm.errors import PycommError

__all__ = ["MOST_NUMBERS", "all_or_none", "by_reason", "digest", "pack_numbers", "unpack_numbers"]

MOST_NUMBERS = 1024  # in a row
_INT, _FLOAT = struct.Struct("<cq"), struct.Struct("<cd")
_TEXT_BYTES = 512
_MEMORY = b"m"  # the kinds of a failed action
_OTHER = b"e"

Result = TypeVar("Result")


def pack_numbers(row: Sequence[float]) -> bytes:
    """A row of ints of 64 bits and floats as bytes; rows of one length are equally long.

    Raises:
        TypeError, ValueError: it is something else, or longer than ``MOST_NUMBERS``.
    """
    if isinstance(row, str | bytes) or not isinstance(row, Sequence):
        raise TypeError(f"agree: row is {row!r}: it is a list or tuple of ints and floats")
    if len(row) > MOST_NUMBERS:
        raise ValueError(f"agree: a row of {len(row)} numbers; it has {MOST_NUMBERS} at most, all_gather moves more")
    if set(map(type, row)) == {int}:  # at once: products of tensor parallelism ask every time
        parts: list[Any] = [b"i"] * (2 * len(row))
        parts[1::2] = row
        with contextlib.suppress(struct.error):  # an int of more bits: the error is made below
            return _ints(len(row)).pack(*parts)
    return b"".join(map(_packed, row))


@functools.cache
def _ints(count: int) -> struct.Struct:
    return struct.Struct("<" + "cq" * count)


def _packed(number: Any) -> bytes:
    if isinstance(number, float):
        return _FLOAT.pack(b"f", number)
    try:
        return _INT.pack(b"i", operator.index(number))
    except struct.error:
        raise ValueError(f"agree: {number} is no int of 64 bits") from None
    except TypeError:
        if isinstance(number, Real):
            return _FLOAT.pack(b"f", float(number))
        raise TypeError(f"agree: {number!r} is in the row: it is neither an int nor a float") from None


def unpack_numbers(row: bytes) -> list[Any]:
    size = _INT.size
    kinds_and_ints = _ints(len(row) // size).unpack(row)
    if b"f" not in kinds_and_ints[::2]:
        return list(kinds_and_ints[1::2])
    parts = [row[start : start + size] for start in range(0, len(row), size)]
    return [(_FLOAT if part[:1] == b"f" else _INT).unpack(part)[1] for part in parts]


def digest(text: str) -> int:
    """A number that stands for ``text`` in a row: 1 to 2**62, the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 2**62 + 1


def all_or_none(
    action: Callable[[], Result], show: Callable[[bytes], list[bytes]], failure: type[PycommError] = PycommError
) -> Result:
    """Run ``action`` on every rank; return its result here if it succeeded on all of them. Collective.

    Args:
        show: returns every rank's row, by rank.

    Raises:
        MemoryError: memory was missing on a rank; on all ranks, with the reasons by rank.
        failure: the action failed otherwise; on all ranks, with the reasons by rank.
    """
    try:
        result = action()
    except Exception as error:
        kind = _MEMORY if isinstance(error, MemoryError) else _OTHER
        name = "" if isinstance(error, MemoryError | PycommError) else f"{type(error).__name__}: "
        text = f"{name}{error}" if str(error) else type(error).__name__
        raise _failed(show(_row(kind, text)), failure) from error
    rows = show(_row(b"", ""))
    if any(row.rstrip(b"\0") for row in rows):
        raise _failed(rows, failure)
    return result


def _row(kind: bytes, text: str) -> bytes:
    return (kind + text.encode(errors="replace"))[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")


def _failed(rows: Sequence[bytes], failure: type[PycommError]) -> Exception:
    rows = [row.rstrip(b"\0") for row in rows]
    text = by_reason([row[1:].decode(errors="ignore") for row in rows])
    return MemoryError(text) if any(row.startswith(_MEMORY) for row in rows) else failure(text)


def by_reason(obstacles: Sequence[str]) -> str:
    """ "there is no GPU (rank 0, 1)", of texts by rank; empty: nobody has one."""
    reasons = dict.fromkeys(filter(None, obstacles))
    ranks = {reason: [str(r) for r, text in enumerate(obstacles) if text == reason] for reason in reasons}
    return "; ".join(f"{reason} (rank {', '.join(numbers)})" for reason, numbers in ranks.items())
