"""Back ends of the Communicator: the same small protocol over different memories and wires, chosen once at init."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pycomm import _C
from pycomm.backends.agreement import by_reason
from pycomm.errors import BackendUnavailableError

if TYPE_CHECKING:
    from pycomm.backends.shm import Flag

__all__ = ["Backend", "Capabilities", "Choice", "choose"]

NAMES = ("auto", "host", "shm", "nccl", "gloo")


@dataclass(frozen=True)
class Capabilities:
    """What the ranks of a group can do beside the calls that all back ends have.

    Attributes:
        has_flags: ranks map each other's symmetric memory, and :meth:`Backend.flag` orders their work on it.
        has_fused_step: :class:`pycomm.fused.FusedCalls` work.
        orders_on_device: calls are enqueued on a GPU's stream and return at once; the host sees nothing of their
            outcome before it waits, so shapes are fixed ahead and messages are issued in one order.
    """

    has_flags: bool = False
    has_fused_step: bool = False
    orders_on_device: bool = False


class Backend(ABC):
    """What a Communicator needs: the calls of its group, and the group's memory and life.

    Back ends in Python have :meth:`submit` and :meth:`exchange`. The extension checks the arguments of every back end's
    calls (:class:`pycomm._C.Calls`): tensors are contiguous, on ``device``, and stay until their Work is over.

    Attributes:
        tokens: the processes of the ranks, each the same number in all its groups; of nobody else.
    """

    name: str
    device: torch.device
    rank: int
    world_size: int
    group: str
    tokens: list[int]
    _timeout_s: float  # of calls that are given none
    capabilities: Capabilities

    @abstractmethod
    def agree(self, row: bytes, timeout_s: float, kind: str = "agree", count: int | None = None) -> list[bytes]:
        """Return every rank's row, by rank. Collective, and matched as other calls are.

        Args:
            row: equally long on all ranks, at most 16 KiB.
            kind: the call that ranks agree for, as errors name it: "agree", "empty" or "split".
            count: what it is about, the same on all ranks: numbers in the row (None: its bytes) or, of "empty", bytes.

        Raises:
            MismatchError: another rank called something else, or shows a row of another length.
        """

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype, timeout_s: float) -> torch.Tensor: ...
    @abstractmethod
    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]: ...
    @abstractmethod
    def split(self, color: int | None, key: int, timeout_s: float) -> Backend | None: ...
    @abstractmethod
    def synchronize(self, timeout_s: float) -> None: ...
    @abstractmethod
    def abort(self, reason: str) -> None: ...
    @abstractmethod
    def close(self, drain_s: float) -> None: ...

    def calls(self) -> _C.Calls:
        """The calls of the group, with the arguments of the Communicator's."""
        return _C.Calls(self, self._timeout_s)

    def submit(
        self,
        call: _C.Call,
        output: torch.Tensor | None,
        input: torch.Tensor | None,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        """Do a collective; return its Work if ``async_op``.

        Args:
            output, input: None: this rank has none; the same tensor where the call works in place.
        """
        raise NotImplementedError

    def exchange(
        self, messages: Sequence[tuple[_C.Call, torch.Tensor]], async_op: bool, timeout_s: float
    ) -> _C.Work | list[int]:
        """Do messages that progress together; return their Work if ``async_op``, else their sources.

        Args:
            messages: calls of kind "send" and "recv"; ``root`` is the peer, -1 any source.
        """
        raise NotImplementedError

    # What not every back end has.

    def host(self) -> _C.HostCommunicator:
        """The extension's end of a group on the host transport."""
        raise BackendUnavailableError(f"this needs the host transport; this communicator is {self.name}")

    def flag(self, tensor: torch.Tensor, timeout_s: float) -> Flag:
        raise BackendUnavailableError(f"flags need the host transport; this communicator is {self.name}")

    def on_host(self, timeout_s: float) -> Backend | None:
        """The same ranks on the host transport, made by all of them; None: they share no host."""
        return None

    def when_it_fails(self, callback: Callable[[], None]) -> None:  # noqa: B027 (nothing waits on a GPU here)
        """Call ``callback``, in any thread, once the group cannot go on, to end what waits for it on a GPU."""

    def cta_budget(self, max_ctas: int) -> AbstractContextManager[None]:
        raise BackendUnavailableError(f"CTA budgets are NCCL's; this communicator is {self.name}")


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
