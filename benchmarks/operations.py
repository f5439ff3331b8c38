"""What each benchmarked operation means: its buffers, its bandwidth factor and the values it must produce.

One table, so that a new benchmark script is a name here and a method of the same name in every contender. Values are
small whole numbers, exact in every dtype in any order of addition, and repeat with the prime period ``PERIOD``: a
slice that lands in the wrong place does not look right by accident. ``buffers.py`` writes and checks them; the driver,
which reads only factors and names here, need not load torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = 0  # of the operations that have one
PERIOD = 1021  # elements; prime, so no power-of-two slice boundary falls on a multiple of it
DTYPES = {  # name -> bytes of an element
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8,
}  # fmt: skip


def value(index: torch.Tensor, rank: int, iteration: int) -> torch.Tensor:
    """What ``rank`` puts at each ``index`` (int64, any shape) in ``iteration``: 0 to 6, periodic in ``PERIOD``."""
    return ((index % PERIOD) * (rank + 2) + iteration * (rank + 1)) % 7


def peer_of(rank: int, world_size: int) -> int | None:
    """The other rank of this one's pair, point to point: 0 and 1, 2 and 3, …; None for one that is left over."""
    peer = rank ^ 1
    return peer if peer < world_size else None


def is_sender(rank: int) -> bool:
    """Whether this rank of a pair sends, or sends first."""
    return rank % 2 == 0


@dataclass(frozen=True)
class Check:
    """A rank that looks at its output after an iteration. part_count: elements of each of the output's parts."""

    rank: int
    world_size: int
    iteration: int
    part_count: int


@dataclass(frozen=True)
class Operation:
    """One collective or point-to-point operation. Counts are elements; "count" is the message, as README.md defines it.

    Args:
        name: also the name of the contenders' method that binds it.
        bus_factor: world size -> busbw / algbw, as derived in README.md.
        expected: (index in a part of the output, which part, check) -> int64 values, periodic in ``PERIOD``.
        input_count: (count, world size) -> elements of the input.
        output_count: the same for the output; None: the operation is in place.
        parts: world size -> number of equal parts of the output that are periodic each for itself.
        cut: the message is one equal part a rank, so that its count is a multiple of the world size.
        sends, receives: (rank, world size) -> whether the rank's input is read, its output written.
        trips: how many messages, one after the other, an iteration is; a row shows the time of one.
        min_ranks: it needs so many.
        sized: False: it has no message, and one row without bytes.
    """

    name: str
    bus_factor: Callable[[int], float]
    expected: Callable[[torch.Tensor, int, Check], torch.Tensor]
    input_count: Callable[[int, int], int] = lambda count, world_size: count
    output_count: Callable[[int, int], int] | None = None
    parts: Callable[[int], int] = lambda world_size: 1
    cut: bool = False
    sends: Callable[[int, int], bool] = lambda rank, world_size: True
    receives: Callable[[int, int], bool] = lambda rank, world_size: True
    trips: int = 1
    min_ranks: int = 1
    sized: bool = True

    def message_bytes(self, num_bytes: int, dtype: str, world_size: int) -> int:
        """``num_bytes`` rounded down to what the operation can have."""
        unit = DTYPES[dtype] * (world_size if self.cut else 1)
        return num_bytes // unit * unit

    def buffer_bytes(self, num_bytes: int, world_size: int) -> int:
        """Input and output of a rank for a message of ``num_bytes``."""
        output = self.output_count(num_bytes, world_size) if self.output_count is not None else 0
        return self.input_count(num_bytes, world_size) + output


def _sum_of(num_ranks: int, index: torch.Tensor, check: Check) -> torch.Tensor:
    total = value(index, 0, check.iteration)
    for peer in range(1, num_ranks):
        total = total + value(index, peer, check.iteration)
    return total


def _sum_of_all(index: torch.Tensor, part: int, check: Check) -> torch.Tensor:
    return _sum_of(check.world_size, index, check)


def _sum_up_to_here(index: torch.Tensor, part: int, check: Check) -> torch.Tensor:
    return _sum_of(check.rank + 1, index, check)


def _my_part(index: torch.Tensor, check: Check) -> torch.Tensor:
    return index + check.rank * check.part_count


def _of_peer(index: torch.Tensor, part: int, check: Check) -> torch.Tensor:
    return value(index, check.rank ^ 1, check.iteration)


def _whole(count: int, world_size: int) -> int:
    return count


def _part(count: int, world_size: int) -> int:
    return count // world_size


def _all_but_one(world_size: int) -> float:
    return (world_size - 1) / world_size


def _one(world_size: int) -> float:
    return 1.0


def _is_root(rank: int, world_size: int) -> bool:
    return rank == ROOT


def _is_paired(rank: int, world_size: int) -> bool:
    return peer_of(rank, world_size) is not None


_TABLE = (
    Operation("all_reduce", lambda n: 2 * (n - 1) / n, _sum_of_all),
    Operation(
        "reduce_scatter", _all_but_one, lambda i, part, at: _sum_of_all(_my_part(i, at), part, at),
        output_count=_part, cut=True,
    ),
    Operation(
        "all_gather", _all_but_one, lambda i, part, at: value(i, part, at.iteration),
        input_count=_part, output_count=_whole, parts=lambda n: n, cut=True,
    ),
    Operation(
        "all_to_all", _all_but_one, lambda i, part, at: value(_my_part(i, at), part, at.iteration),
        output_count=_whole, parts=lambda n: n, cut=True,
    ),
    Operation("broadcast", _one, lambda i, part, at: value(i, ROOT, at.iteration)),
    Operation("reduce", _one, _sum_of_all, receives=_is_root),
    Operation("scan", _one, _sum_up_to_here),
    Operation(
        "gather", _all_but_one, lambda i, part, at: value(i, part, at.iteration),
        input_count=_part, output_count=_whole, parts=lambda n: n, cut=True, receives=_is_root,
    ),
    Operation(
        "scatter", _all_but_one, lambda i, part, at: value(_my_part(i, at), ROOT, at.iteration),
        output_count=_part, cut=True, sends=_is_root,
    ),
    Operation("barrier", _one, _sum_of_all, sized=False),
    Operation(
        "ping_pong", _one, _of_peer,
        output_count=_whole, sends=_is_paired, receives=_is_paired, trips=2, min_ranks=2,
    ),
    Operation(
        "send", _one, _of_peer,
        output_count=_whole, sends=lambda rank, n: is_sender(rank) and _is_paired(rank, n),
        receives=lambda rank, n: not is_sender(rank), min_ranks=2,
    ),
)  # fmt: skip
OPERATIONS = {operation.name: operation for operation in _TABLE}
COLLECTIVES = tuple(op.name for op in _TABLE if op.name not in ("ping_pong", "send"))
