"""Back ends of the Communicator: the same small protocol over different memories and wires, chosen once at init."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from pycomm import _C
from pycomm.errors import BackendUnavailableError

__all__ = ["Backend", "Choice", "Message", "choose"]

NAMES = ("auto", "shm", "nccl", "gloo")


class Message(NamedTuple):
    """One send or receive; ``peer`` -1: from any source."""

    is_send: bool
    tensor: torch.Tensor
    peer: int
    tag: int


class Backend(Protocol):
    """What a Communicator needs. Tensors are contiguous and on ``device``; names of ops are checked here.

    ``counts`` are elements of each rank's part: of the input of reduce_scatter, of the output of all_gather, of the
    root's tensor in gather and scatter, where the other ranks have None. Calls
    return a Work when ``async_op``, else None.
    """

    name: str
    device: torch.device

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def group(self) -> str: ...

    def all_reduce(self, tensor: torch.Tensor, op: str, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def broadcast(self, tensor: torch.Tensor, root: int, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def reduce(self, tensor: torch.Tensor, root: int, op: str, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        counts: Sequence[int],
        op: str,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None: ...
    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None: ...
    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None: ...
    def all_to_all_by_splits(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_counts: Sequence[int],
        input_counts: Sequence[int],
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None: ...
    def gather(
        self,
        output: torch.Tensor | None,
        input: torch.Tensor,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None: ...
    def scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor | None,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None: ...
    def send(self, tensor: torch.Tensor, dst: int, tag: int, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def recv(self, tensor: torch.Tensor, src: int, tag: int, async_op: bool, timeout_s: float) -> _C.Work | int: ...
    def exchange(self, messages: Sequence[Message], async_op: bool, timeout_s: float) -> _C.Work | list[int]: ...
    def barrier(self, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def empty(self, shape: Sequence[int], dtype: torch.dtype, timeout_s: float) -> torch.Tensor: ...
    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]: ...
    def split(self, color: int | None, key: int, timeout_s: float) -> Backend | None: ...
    def abort(self, reason: str) -> None: ...
    def close(self, drain_s: float) -> None: ...


@dataclass(frozen=True)
class Choice:
    """A back end's name and why it was chosen, for the log and for ``pycomm doctor``."""

    name: str
    reason: str


def choose(requested: str, hosts: Sequence[str]) -> Choice:
    """Resolve ``requested`` ("auto" or a name) for ranks on these hosts.

    A pure function of what all ranks exchanged, so that all choose the same.

    Raises:
        ValueError: no such back end.
        BackendUnavailableError: it cannot work here.
    """
    if requested not in NAMES:
        raise ValueError(f"backend={requested!r}: it is one of {', '.join(NAMES)}")
    num_hosts = len(set(hosts))
    if requested == "nccl":
        raise BackendUnavailableError("backend='nccl' is not in this version of pycomm; use 'shm', 'gloo' or 'auto'")
    if requested == "gloo":
        return Choice("gloo", "asked for: every message goes through sockets, inside a host, too")
    if num_hosts == 1:
        reason = "asked for" if requested == "shm" else f"all {len(hosts)} rank(s) share this host's memory"
        return Choice("shm", reason)
    if requested == "shm":
        raise BackendUnavailableError(
            f"backend='shm': the {len(hosts)} ranks are on {num_hosts} hosts (or in separate network namespaces), "
            f"which share no memory; 'auto' takes shared memory inside each host and gloo between them"
        )
    return Choice(
        "gloo+shm", f"the {len(hosts)} ranks are on {num_hosts} hosts: shared memory inside each, gloo between them"
    )
