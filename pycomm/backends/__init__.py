"""Back ends of the Communicator: the same small protocol over different memories and wires, chosen once at init."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pycomm import _C
from pycomm.arguments import Message
from pycomm.errors import BackendUnavailableError

__all__ = ["Backend", "Calls", "Choice", "by_reason", "choose"]

NAMES = ("auto", "host", "shm", "nccl", "gloo")


class Calls(Protocol):
    """What all ranks of a group call, with the arguments of :class:`pycomm.communicator.Communicator`'s methods.

    Whoever implements it checks them, so that the common call passes from its caller to the extension at once; back
    ends in Python leave that to :class:`pycomm.arguments.Checked`. Calls return a Work when ``async_op``, else None.
    ``timeout_s`` None: the communicator's.
    """

    def all_reduce(self, tensor: Any, op: str, async_op: bool, timeout_s: float | None, /) -> _C.Work | None: ...
    def broadcast(self, tensor: Any, root: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None: ...
    def reduce(self, tensor: Any, root: int, op: str, async_op: bool, timeout_s: float | None, /) -> _C.Work | None: ...
    def reduce_scatter(
        self,
        output: Any,
        input: Any,
        op: str,
        input_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> _C.Work | None: ...
    def all_gather(
        self,
        output: Any,
        input: Any,
        output_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> _C.Work | None: ...
    def all_to_all(
        self,
        output: Any,
        input: Any,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> _C.Work | None: ...
    def gather(
        self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, /
    ) -> _C.Work | None: ...
    def scatter(
        self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, /
    ) -> _C.Work | None: ...
    def barrier(self, async_op: bool, timeout_s: float | None, /) -> _C.Work | None: ...
    def send(self, tensor: Any, dst: int, tag: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None: ...
    def recv(
        self, tensor: Any, src: int | None, tag: int, async_op: bool, timeout_s: float | None, /
    ) -> _C.Work | int: ...
    def exchange(
        self, messages: Sequence[Message], async_op: bool, timeout_s: float | None, /
    ) -> _C.Work | list[int]: ...


class Backend(Protocol):
    """What a Communicator needs: the calls of its group, and the group's memory and life.

    Attributes:
        tokens: the processes of the ranks, each the same number in all its groups; of nobody else.
    """

    name: str
    device: torch.device
    rank: int
    world_size: int
    group: str
    tokens: list[int]
    calls: Calls

    def empty(self, shape: Sequence[int], dtype: torch.dtype, timeout_s: float) -> torch.Tensor: ...
    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]: ...
    def split(self, color: int | None, key: int, timeout_s: float) -> Backend | None: ...
    def synchronize(self, timeout_s: float) -> None: ...
    def abort(self, reason: str) -> None: ...
    def close(self, drain_s: float) -> None: ...


@dataclass(frozen=True)
class Choice:
    """A back end's name and why it was chosen, for the log and for ``pycomm doctor``."""

    name: str
    reason: str


def choose(requested: str, hosts: Sequence[str], obstacles: Sequence[str] = (), gpus: Sequence[str] = ()) -> Choice:
    """Resolve ``requested`` (one of ``NAMES``) for ranks on these hosts.

    A pure function of what all ranks exchanged, so that all choose the same.

    Args:
        obstacles: by rank, why NCCL cannot work there, or nothing; looked at for "nccl" and "auto".
        gpus: by rank, the GPU that it would use, by any name that is unique on its host, or nothing; for "auto".

    Raises:
        ValueError: no such back end.
        BackendUnavailableError: it cannot work here.
    """
    if requested not in NAMES:
        raise ValueError(f"backend={requested!r}: it is one of {', '.join(NAMES)}")
    num_hosts = len(set(hosts))
    if requested == "nccl":
        if any(obstacles):
            raise BackendUnavailableError(f"backend='nccl': {by_reason(obstacles)}")
        return Choice("nccl", "asked for")
    if requested == "gloo":
        return Choice("gloo", "asked for: every message goes through sockets, inside a host, too")
    aside = ""
    if requested == "auto" and any(gpus):
        why_not = by_reason(obstacles) or _shared_gpus(hosts, gpus)
        if not why_not:
            return Choice("nccl", f"each of the {len(hosts)} rank(s) has a GPU of its own")
        aside = f"; not nccl: {why_not}"
    if num_hosts == 1:
        reason = "asked for" if requested == "shm" else f"all {len(hosts)} rank(s) share this host's memory"
        return Choice("shm", reason + aside)
    if requested == "shm":
        raise BackendUnavailableError(
            f"backend='shm': the {len(hosts)} ranks are on {num_hosts} hosts (or in separate network namespaces), "
            f"which share no memory; 'host' takes shared memory inside each host and gloo between them"
        )
    return Choice(
        "gloo+shm",
        f"the {len(hosts)} ranks are on {num_hosts} hosts: shared memory inside each, gloo between them{aside}",
    )


def _shared_gpus(hosts: Sequence[str], gpus: Sequence[str]) -> str:
    """Which ranks do not have a GPU of their own; empty: all have."""
    users: dict[tuple[str, str], list[str]] = {}
    for rank, place in enumerate(zip(hosts, gpus, strict=True)):
        users.setdefault(place, []).append(str(rank))
    return "; ".join(f"ranks {', '.join(ranks)} share a GPU" for ranks in users.values() if len(ranks) > 1)


def by_reason(obstacles: Sequence[str]) -> str:
    """ "there is no GPU (rank 0, 1)", of texts by rank; empty: nobody has one."""
    reasons = dict.fromkeys(filter(None, obstacles))
    ranks = {reason: [str(r) for r, text in enumerate(obstacles) if text == reason] for reason in reasons}
    return "; ".join(f"{reason} (rank {', '.join(numbers)})" for reason, numbers in ranks.items())
