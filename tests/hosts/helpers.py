"""Ranks of several hosts on one machine: each process is told which host it is on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

import pycomm
from pycomm import Communicator
from tests.pool import TIMEOUT_S
from tests.processes import Processes

LAYOUTS = ("aabb", "abb", "abab", "aaab", "abc")  # a letter a rank: its host


def hosts_of(layout: str) -> tuple[tuple[int, ...], ...]:
    """The ranks of each host, hosts in the order of their lowest rank."""
    return tuple(tuple(r for r, name in enumerate(layout) if name == host) for host in dict.fromkeys(layout))


def connect_rank(port: int, layout: str, rank: int, backend: str, timeout_s: float, strict: bool) -> Communicator:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    with patch("pycomm.records.host_identity", lambda: layout[rank]):
        return pycomm.init(backend, store=store, rank=rank, world_size=len(layout), timeout_s=timeout_s, strict=strict)


class Hosts(Processes):
    """Ranks on the hosts that ``layout`` names, a letter a rank.

    ``timeout_s``: one, or each rank's. ``with_port``: the body's last argument is the port of the store.
    """

    def __init__(
        self,
        layout: str,
        body: Callable[..., Any],
        *args: Any,
        backend: str = "auto",
        timeout_s: float | Sequence[float] = TIMEOUT_S,
        strict: bool = False,
        with_port: bool = False,
    ) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        connect = functools.partial(connect_rank, self._store.port, layout, backend=backend, strict=strict)
        if with_port:
            args += (self._store.port,)
        timeouts = [timeout_s] * len(layout) if isinstance(timeout_s, (int, float)) else timeout_s
        connects = [functools.partial(connect, rank=rank, timeout_s=timeouts[rank]) for rank in range(len(layout))]
        super().__init__(connects, body, *args)
