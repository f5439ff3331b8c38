"""Two network namespaces as two hosts of two ranks each, a cable between them, and what happens when it is cut."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

import pycomm
from pycomm import Communicator
from pycomm.errors import PycommError
from tests.hosts.helpers import hosts_of
from tests.hosts.test_collectives import every_call, random_cases
from tests.hosts.test_messages import random_exchanges
from tests.pool import TIMEOUT_S, start_worker

LAYOUT = "aabb"
CUT_TIMEOUT_S = 3.0
GRACE_S = 4.0  # after a deadline, docs/several_hosts.md
CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2, connected by a pair of virtual interfaces named ``cable``."""
    names = [f"pycomm-{host}-{os.getpid()}" for host in "ab"]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
    except OSError as error:  # no `ip`, or not permitted
        for name in made:
            ip("netns", "delete", name)
        pytest.skip(f"this machine gives no network namespaces: {error}")
    yield names
    for name in names:
        ip("netns", "delete", name)


def enter(namespace: str) -> None:
    """Move this process; threads that it starts follow."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run_rank(connection: Connection, namespace: str, rank: int, timeout_s: float) -> None:
    enter(namespace)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="10.77.0.1", MASTER_PORT="29577")
    comm = pycomm.init(timeout_s=TIMEOUT_S)
    assert comm.backend == "gloo+shm"
    hosts = hosts_of(LAYOUT)
    random_cases(comm, connection, hosts, 1, 40)
    every_call(comm, connection, hosts)
    random_exchanges(comm, connection, 5, 10)
    connection.send("all right")
    connection.recv()
    connection.send((reduce_until_cut(comm, timeout_s), time.monotonic()))
    connection.recv()  # stay until the test is over


def reduce_until_cut(comm: Communicator, timeout_s: float) -> Any:
    try:
        for _ in range(1_000_000):
            comm.all_reduce(torch.ones(300_000), timeout_s=timeout_s)
    except PycommError as error:
        return type(error).__name__, str(error), getattr(error, "missing_ranks", None)


def test_two_hosts_and_a_cut_cable(namespaces: list[str]) -> None:
    pairs = [multiprocessing.Pipe() for _ in LAYOUT]
    connections = [ours for ours, _ in pairs]
    processes = [
        start_worker(run_rank, theirs, namespaces[rank // 2], rank, CUT_TIMEOUT_S)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for _, theirs in pairs:
        theirs.close()
    try:
        for connection in connections:
            assert connection.recv() == "all right"
        for connection in connections:
            connection.send("reduce")
        assert not connections[0].poll(0.5)  # they do, and nothing fails
        ip("-n", namespaces[1], "link", "set", "cable", "down")
        cut_at = time.monotonic()
        for rank, connection in enumerate(connections):
            (kind, message, missing), at = connection.recv()
            there = [2, 3] if rank < 2 else [0, 1]
            assert kind == "PeerTimeoutError", message
            assert missing, message
            assert set(missing) <= set(there), message
            assert "all_reduce(sum, float32[300000])" in message
            assert at - cut_at < CUT_TIMEOUT_S + GRACE_S
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(20)
            process.kill()
            process.join()
