"""The ranks of one host inside a group of several hosts: the host transport, called synchronously on flat tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pycomm import _C
from pycomm.backends.gloo.topology import Topology
from pycomm.backends.shm import ShmBackend, meet_on_this_host, tuning_here
from pycomm.rendezvous import Rendezvous

__all__ = ["LocalGroup"]


class LocalGroup:
    """Ranks are places in ``topology.neighbours``. Every call raises what the host transport raises."""

    def __init__(self, core: _C.HostCommunicator) -> None:
        self.shm = ShmBackend(core)
        self.size = core.world_size
        self.tokens = core.tokens
        self._core = core
        self._calls = self.shm.calls()

    @classmethod
    def connect(cls, rendezvous: Rendezvous, topology: Topology, name: str) -> LocalGroup:
        """Meet the other ranks of this host."""
        ranks = topology.neighbours
        # Not strict: the host transport would compare orders of steps, which are not the caller's calls.
        return cls(meet_on_this_host(rendezvous, ranks, name, False, tuning_here(len(ranks))))

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], op: str, timeout_s: float
    ) -> None:
        self._calls.reduce_scatter(output, input, op, counts, False, timeout_s)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], timeout_s: float) -> None:
        self._calls.all_gather(output, input, counts, False, timeout_s)

    def broadcast(self, tensor: torch.Tensor, root: int, timeout_s: float) -> None:
        self._calls.broadcast(tensor, root, False, timeout_s)

    def exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]], timeout_s: float
    ) -> None:
        """(tensor, peer) each; a step of a collective."""
        messages = [(False, tensor, peer, _C.Calls.STEP_TAG) for tensor, peer in receives]
        messages += [(True, tensor, peer, _C.Calls.STEP_TAG) for tensor, peer in sends]
        self._calls.exchange(messages, False, timeout_s)

    def start(self, is_send: bool, tensor: torch.Tensor, peer: int | None, tag: int, timeout_s: float) -> _C.Work:
        work = self._calls.exchange([(is_send, tensor, peer, tag)], True, timeout_s)
        assert not isinstance(work, list)
        return work

    def receive_arrived(self, tensor: torch.Tensor, tag: int, timeout_s: float) -> _C.Work | None:
        """Receive from whoever has sent already; None if nobody has."""
        return self._calls.receive_arrived(tensor, tag, timeout_s)

    def split(self, color: int | None, key: int, timeout_s: float) -> LocalGroup | None:
        core = self._core.split(color, key, timeout_s)
        return None if core is None else LocalGroup(core)

    def abort(self, reason: str) -> None:
        self._core.abort(reason)

    def close(self, drain_s: float) -> None:
        self._core.close(drain_s)
