"""Small numbers that all ranks tell each other, to see whether they mean the same."""

from __future__ import annotations

import hashlib

import torch

from pycomm.communicator import Communicator

__all__ = ["number_of", "numbers_of_all"]

_DIGEST_BYTES = 7  # a positive int64


def number_of(text: str) -> int:
    """The same number for the same text; another one for another text, in practice."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest(), "little")


def numbers_of_all(comm: Communicator, mine: int) -> list[int]:
    """Every rank's number, by rank. Collective."""
    numbers = torch.empty(comm.world_size, dtype=torch.int64, device=comm.device)
    comm.all_gather(numbers, torch.tensor([mine], device=comm.device))
    return numbers.tolist()
