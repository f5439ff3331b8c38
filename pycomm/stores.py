"""The store of a job that was launched by environment variables: the launcher's, or one that rank 0 serves.

A process keeps each store that it has opened for as long as it lives: the other ranks may come to rank 0's at any time,
in this ``init`` or in the next one, and a server that closed between two would end the connections of the second.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from pycomm import env
from pycomm.errors import PycommError

__all__ = ["open_store", "watched"]

_Connection = TypeVar("_Connection")

_LOOK_S = 0.05
_SLACK_S = 0.5  # for torch to say itself that its deadline has passed
_FOREIGN_S = 3.0  # for whoever has taken the port to answer as a store does

# By process, since a forked child must not use its parent's connections; by address.
_opened: dict[tuple[int, str, int], tuple[dist.TCPStore, bool]] = {}


def open_store(launched: env.Launch, timeout_s: float) -> tuple[dist.TCPStore, bool]:
    """Connect to the job's store; rank 0 serves it, on MASTER_ADDR alone, unless the launcher does.

    Returns:
        The store, and whether it is the job's: False where this rank should serve it and somebody else's has the port.

    Raises:
        PycommError: there is no store.
    """
    key = (os.getpid(), launched.master_addr, launched.master_port)
    if key in _opened and _answers(_opened[key][0]):
        return _opened[key]
    serves = launched.rank == 0 and not launched.agent_store
    advice = "choose a free port, and an address of the host where rank 0 runs" if serves else "is rank 0 running?"
    is_own = True
    try:
        try:
            store = _connect(launched, serves, timeout_s)
        except dist.DistError:
            if not serves:
                raise
            store, is_own = _connect(launched, False, min(timeout_s, _FOREIGN_S)), False
    except (OSError, dist.DistError) as error:
        raise PycommError(f"init: no store at {launched.where}: {error}; {advice}") from error
    if is_own:
        _opened[key] = store, is_own
    return store, is_own


def watched(connect: Callable[[], _Connection], check: Callable[[], None]) -> _Connection:
    """What ``connect`` returns. It cannot be interrupted, so it runs in a thread; when ``check``, which is called again
    and again, raises, or Ctrl-C comes, the thread is left to itself and ends when ``connect`` does."""
    future: Future[_Connection] = Future()

    def run() -> None:
        try:
            future.set_result(connect())
        except (OSError, RuntimeError, ValueError) as error:
            future.set_exception(error)

    threading.Thread(target=run, name="pycomm-connect", daemon=True).start()
    while not future.done():
        wait([future], _LOOK_S)
        if not future.done():
            check()
    return future.result()


def _answers(store: dist.Store) -> bool:
    try:
        store.check(["pycomm"])
    except dist.DistError:  # its server has ended, and another one may have come
        return False
    return True


def _connect(launched: env.Launch, serves: bool, timeout_s: float) -> dist.TCPStore:
    listener = _listen(launched.master_addr, launched.master_port) if serves else None
    deadline = time.monotonic() + timeout_s + _SLACK_S

    def check() -> None:
        if time.monotonic() > deadline:  # a client waits without a deadline for the first answer
            raise OSError(errno.ETIMEDOUT, f"what listens there is no store: it said nothing for {timeout_s:g} s")

    return watched(
        lambda: dist.TCPStore(
            launched.master_addr,
            launched.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # shared with a later init_process_group() of this process
            master_listen_fd=None if listener is None else listener.detach(),
        ),
        check,
    )


def _listen(host: str, port: int) -> socket.socket | None:
    """A listening socket on that address alone, since torch's own server would listen on every interface.

    Returns:
        None if the port is taken: by this process's own store, which torch shares then, or by somebody else, and then
        the TCPStore says so.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return listener
