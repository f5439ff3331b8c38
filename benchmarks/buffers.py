"""Writing the ranks' inputs and checking their results; the values are those of ``operations.py``."""

from __future__ import annotations

import torch
from operations import PERIOD, Check, Operation, value


def fill(tensor: torch.Tensor, rank: int, iteration: int) -> None:
    """Overwrite the 1-d ``tensor`` with this rank's values; reads one period from cache, writes everything."""
    tile = value(torch.arange(PERIOD), rank, iteration).to(tensor.dtype)
    whole = tensor.numel() // PERIOD * PERIOD
    tensor[:whole].view(-1, PERIOD).copy_(tile)
    tensor[whole:].copy_(tile[: tensor.numel() - whole])


def count_wrong(op: Operation, output: torch.Tensor, rank: int, world_size: int, iteration: int) -> int:
    """Elements of the 1-d ``output`` that are not exactly what ``op`` must give (integers wrap as the dtype does)."""
    num_parts = op.parts(world_size)
    part_count = output.numel() // num_parts
    check = Check(rank, world_size, iteration, part_count)
    wrong = 0
    for number in range(num_parts):
        part = output[number * part_count : (number + 1) * part_count]
        index = torch.arange(min(PERIOD, part_count))
        tile = op.expected(index, number, check).to(output.dtype)
        whole = part_count // PERIOD * PERIOD
        rows = part[:whole].view(-1, PERIOD)
        for begin in range(0, rows.shape[0], 1024):  # blocks: the comparison's own memory stays small
            wrong += int((rows[begin : begin + 1024] != tile).sum())
        wrong += int((part[whole:] != tile[: part_count - whole]).sum())
    return wrong
