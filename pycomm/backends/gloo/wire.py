"""Bytes between hosts: torch's gloo, used without a global process group, as tagged sends and receives over TCP.

Each group of ranks has two: one for the data of collectives, whose calls wait for it, and one for short frames
(``frames.py``). A wait that runs out ends a gloo group for good, on both sides; since a failed call ends a
communicator anyway, that is used on purpose: :meth:`Wire.cut`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pycomm.errors import BackendUnavailableError, PeerTimeoutError, PycommError
from pycomm.rendezvous import UnconnectedError
from pycomm.stores import watched

__all__ = ["Wire", "WireError", "open_device"]

_DATA_TAG = 1
_CUT_TAG = 2
_FOR_EVER = timedelta(days=365)
_AT_ONCE = timedelta(milliseconds=1)
_LOOK_S = 0.05
_GRACE_S = 1.0  # for news of why a connection could not be made


class WireError(Exception):
    """A send or receive failed.

    Attributes:
        rank: its peer.
        expired: the deadline passed; otherwise the connection is closed.
        waited: ranks that were waited for.
        silent: ranks that may have caused it, where nothing better is known.
    """

    def __init__(self, rank: int, expired: bool, text: str) -> None:
        super().__init__(text)
        self.rank = rank
        self.expired = expired
        self.waited: tuple[int, ...] = (rank,)
        self.silent: tuple[int, ...] = (rank,)


def open_device(address: str, interface: str | None) -> dist.ProcessGroupGloo.Device:
    """Where gloo listens and connects: this address of the host alone, or that of a named interface.

    Raises:
        BackendUnavailableError: torch has no gloo, or there is no such address here.
    """
    if not dist.is_gloo_available():
        raise BackendUnavailableError("this torch is built without gloo, which connects hosts")
    try:
        if interface is not None:
            return dist.ProcessGroupGloo.create_device(interface=interface)
        return dist.ProcessGroupGloo.create_device(hostname=address)
    except RuntimeError as error:
        where = address if interface is None else f"the interface {interface} (GLOO_SOCKET_IFNAME)"
        raise BackendUnavailableError(f"gloo cannot listen at {where}: {error}") from error


class Wire:
    """Connections from this rank to every other rank of a group.

    Args:
        store: of this group alone; all its ranks come there.
        check: called again and again while it connects; raises when waiting for the others is in vain.

    Raises:
        PeerTimeoutError: not all ranks could be connected within ``timeout_s``; names all others.
        UnconnectedError: a connection failed, and ``check`` does not say why.
    """

    def __init__(
        self,
        store: dist.Store,
        device: dist.ProcessGroupGloo.Device,
        rank: int,
        world_size: int,
        timeout_s: float,
        check: Callable[[], None],
    ) -> None:
        # Any: torch's stubs leave out what the extension has.
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [device]
        options._threads = 1  # it runs gloo's own collectives, which are not used
        options._timeout = timedelta(seconds=timeout_s)
        begin = time.monotonic()
        try:
            self._group: Any = watched(lambda: gloo(store, rank, world_size, options), check)
        except PycommError:  # of check
            raise
        except RuntimeError as error:
            text = f"init: rank {rank} could not connect to all ranks of other hosts"
            if time.monotonic() >= begin + timeout_s:
                others = [peer for peer in range(world_size) if peer != rank]
                text += f" within {timeout_s:g} s"
                raise PeerTimeoutError(text, op="init", missing_ranks=others) from error
            end = time.monotonic() + _GRACE_S
            while time.monotonic() < end:
                check()
                time.sleep(_LOOK_S)
            raise UnconnectedError(f"{text}: {error}") from error

    def send(self, tensor: torch.Tensor, rank: int, tag: int = _DATA_TAG) -> dist.Work:
        """Start to send; the tensor must stay as it is until the Work has been waited for."""
        try:
            work: dist.Work = self._group.send([tensor], rank, tag)
        except RuntimeError as error:
            raise WireError(rank, False, str(error)) from error
        return work

    def receive(self, tensor: torch.Tensor, rank: int, tag: int = _DATA_TAG) -> dist.Work:
        """Start to receive; messages of a pair of ranks and a tag match in order, and must be equally long."""
        try:
            work: dist.Work = self._group.recv([tensor], rank, tag)
        except RuntimeError as error:
            raise WireError(rank, False, str(error)) from error
        return work

    def wait_long(self, work: dist.Work, rank: int) -> None:
        """Wait until ``work`` with ``rank`` is done; WireError when the connection is closed, here or there."""
        try:
            work.wait(_FOR_EVER)
        except RuntimeError as error:
            raise WireError(rank, False, str(error)) from error

    def wait(self, work: dist.Work, rank: int, deadline: float) -> None:
        """Wait until ``work`` with ``rank`` is done, or until ``deadline`` (of time.monotonic).

        Raises:
            WireError: it failed, and the wire is cut if the deadline passed.
        """
        left_s = max(deadline - time.monotonic(), 0.001)
        try:
            work.wait(timedelta(seconds=left_s))
        except RuntimeError as error:
            raise WireError(rank, time.monotonic() >= deadline, str(error)) from error

    def cut(self) -> None:
        """Close all connections and end all waits, here and at the other ends, with a WireError. Idempotent."""
        try:
            self._group.recv_anysource([torch.empty(1, dtype=torch.uint8, device="cpu")], _CUT_TAG).wait(_AT_ONCE)
        except RuntimeError:
            return  # nobody sends with that tag: the wait has run out, which is what closes the connections
