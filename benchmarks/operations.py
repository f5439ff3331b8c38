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

PERIOD = 1021  # elements; prime, so no power-of-two slice boundary falls on a multiple of it
DTYPES = {  # name -> bytes of an element
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8,
}  # fmt: skip


def value(index: torch.Tensor, rank: int, iteration: int) -> torch.Tensor:
    """What ``rank`` puts at each ``index`` (int64, any shape) in ``iteration``: 0 to 6, periodic in ``PERIOD``."""
    return ((index % PERIOD) * (rank + 2) + iteration * (rank + 1)) % 7


@dataclass(frozen=True)
class Operation:
    """One collective or point-to-point operation.

    Args:
        name: also the name of the contenders' method that binds it.
        bus_factor: world size -> busbw / algbw, as derived in README.md.
        expected: (index in the output, rank, world size, iteration) -> int64 values, periodic in ``PERIOD`` within
            each of the output's ``parts``.
        input_count: (message count, world size) -> elements of the input.
        output_count: the same for the output; None: the operation is in place.
        parts: world size -> number of equal parts of the output that are periodic each for itself.
    """

    name: str
    bus_factor: Callable[[int], float]
    expected: Callable[[torch.Tensor, int, int, int], torch.Tensor]
    input_count: Callable[[int, int], int] = lambda count, world_size: count
    output_count: Callable[[int, int], int] | None = None
    parts: Callable[[int], int] = lambda world_size: 1


def _sum_of_all(index: torch.Tensor, rank: int, world_size: int, iteration: int) -> torch.Tensor:
    total = value(index, 0, iteration)
    for peer in range(1, world_size):
        total = total + value(index, peer, iteration)
    return total


OPERATIONS = {
    "all_reduce": Operation("all_reduce", lambda n: 2 * (n - 1) / n, _sum_of_all),
}
