"""Ranks that run out of batches at different times.

Before the first bucket of a synchronising backward, every rank says whether it has one. A rank that has run out says
no, and sends zeros as long as somebody says yes.

Ref: torch.distributed.algorithms.Join, whose averages divide by the number of ranks, too.
"""

from __future__ import annotations

import torch

from pycomm.communicator import Communicator


class Joining:
    """One ``with ddp.join():`` block on one rank."""

    def __init__(self, comm: Communicator) -> None:
        self.last_active: list[int] = []  # the ranks that had the last backward
        self._comm = comm

    def announce(self, *, active: bool) -> bool:
        """Say whether this rank has a backward; returns whether any rank has. Collective."""
        flags = torch.zeros(self._comm.world_size, dtype=torch.int32, device=self._comm.device)
        flags[self._comm.rank] = int(active)
        self._comm.all_reduce(flags)
        ranks: list[int] = torch.nonzero(flags).flatten().tolist()
        if ranks:
            self.last_active = ranks
        return bool(ranks)
