"""Symmetric memory that a rank cannot have: the same MemoryError on every rank, with the reason and the rank's name.

Every limit is met by one rank alone, whose process is its own. The communicator and what it had before stay usable.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from pycomm import _C, Communicator
from tests.hosts.helpers import Hosts
from tests.processes import Ranks

MIB = 1 << 20
LARGE = 64 * MIB  # elements of float32


@contextlib.contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def little_address_space() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with limited(resource.RLIMIT_AS, pages * resource.getpagesize() + 16 * MIB):
        yield


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    before = signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which ends a process; Python ignores it
    try:
        with limited(resource.RLIMIT_FSIZE, MIB):
            yield
    finally:
        signal.signal(signal.SIGXFSZ, before)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    held = []
    with limited(resource.RLIMIT_NOFILE, 256):
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        try:
            yield
        finally:
            for fd in held:
                os.close(fd)


LIMITS = {
    "address space": (little_address_space, "Cannot allocate memory"),
    "size of files": (small_files, "File too large"),
    "descriptors": (no_descriptors, "Too many open files"),
}


def refused(comm: Communicator, limit: Callable[[], contextlib.AbstractContextManager[None]], poor: int) -> str:
    with limit() if comm.rank == poor else contextlib.nullcontext(), pytest.raises(MemoryError) as raised:
        comm.empty(LARGE)
    return str(raised.value)


def cases(creators: tuple[int, ...], world_size: int) -> list[tuple[str, int]]:
    """Each limit at each rank that meets it: the size of files is a matter of the ranks that make the memory."""
    return [(name, r) for name in LIMITS for r in (creators if name == "size of files" else range(world_size))]


def every_limit(comm: Communicator, _: Connection, creators: tuple[int, ...] = (0,)) -> list[str]:
    kept = comm.empty(1000)
    kept.fill_(1.0)
    said = []
    for name, poor in cases(creators, comm.world_size):
        said.append(refused(comm, LIMITS[name][0], poor))
        comm.all_reduce(kept, "max")  # nothing was poisoned
        again = comm.empty(1000)
        again.fill_(2.0)
        comm.all_reduce(again)
        assert (again == 2 * comm.world_size).all()
    assert (kept == 1.0).all()
    return said


def check(everyone: list[list[str]], creators: tuple[int, ...] = (0,)) -> None:
    assert all(said == everyone[0] for said in everyone)
    for text, (name, poor) in zip(everyone[0], cases(creators, len(everyone)), strict=True):
        assert f"rank {poor}: " in text, text
        assert LIMITS[name][1] in text, text
        assert not any(f"rank {r}: " in text for r in range(len(everyone)) if r != poor), text


def test_limits_of_a_process(tmp_path: Path) -> None:
    """Catches limits that poison the communicator, end the process, or leave the others waiting."""
    with Ranks(tmp_path, 2, every_limit) as ranks:
        check(ranks.results())


def test_limits_on_several_hosts() -> None:
    """Catches ranks that are named by their place inside a host."""
    with Hosts("abb", every_limit, (0, 1)) as hosts:
        check(hosts.results(), (0, 1))


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 100 MiB beside this process's."""
    found = _own_memory_cgroup()
    if found is None or not os.access(found, os.W_OK):
        pytest.skip("this process may not make a memory cgroup")
    group = found / f"pycomm-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / "memory.max"
        limit = limit if limit.exists() else group / "memory.limit_in_bytes"
        limit.write_text(str(100 * MIB))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"this process may not make a memory cgroup: {error}")
    yield group
    group.rmdir()


def _own_memory_cgroup() -> Path | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return Path("/sys/fs/cgroup/memory" + path)
        if controllers == "" and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            return Path("/sys/fs/cgroup" + path)
    return None


def in_small_cgroup(comm: Communicator, connection: Connection) -> str:
    if comm.rank == 1:
        Path(connection.recv(), "cgroup.procs").write_text(str(os.getpid()))
    comm.barrier()
    with pytest.raises(MemoryError) as raised:
        comm.empty(LARGE)
    comm.barrier()
    if comm.rank == 1:
        parent = _own_memory_cgroup()
        assert parent is not None
        Path(parent.parent, "cgroup.procs").write_text(str(os.getpid()))
    comm.all_reduce(torch.ones(3))
    return str(raised.value)


def test_a_limit_of_a_cgroup(tmp_path: Path, small_cgroup: Path) -> None:
    """Catches memory that the host has and the cgroup does not: the kernel would end the process."""
    with Ranks(tmp_path, 2, in_small_cgroup) as ranks:
        ranks.connections[1].send(str(small_cgroup))
        texts = ranks.results()
    assert texts[0] == texts[1]
    assert "rank 1" in texts[0]
    assert "cgroup" in texts[0]


def test_limits_of_cgroups_are_read(tmp_path: Path) -> None:
    """Version 1 and 2, the own group and those above it, seen from inside a container and from outside."""

    def tree(files: dict[str, str]) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return str(root)

    meminfo = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable: 8000 kB\n"}
    version_2 = tree(
        meminfo
        | {
            "proc/self/cgroup": "1:name=systemd:/\n0::/jobs/one\n",
            "proc/self/mountinfo": "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/jobs/memory.max": "5000000\n",
            "sys/fs/cgroup/jobs/memory.current": "1000000\n",
            "sys/fs/cgroup/jobs/memory.stat": "anon 500000\ninactive_file 200000\nactive_file 100000\n",
            "sys/fs/cgroup/jobs/one/memory.max": "max\n",
            "sys/fs/cgroup/jobs/one/memory.current": "1000000\n",
        }
    )
    assert sorted(_C.memory_left(version_2)) == [4_300_000, 8_192_000]
    version_1 = tree(
        meminfo
        | {
            "proc/self/cgroup": "4:memory:/docker/abc/inner\n0::/\n",
            "proc/self/mountinfo": (
                "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
                "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
            ),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000\n",
            "sys/fs/cgroup/memory/inner/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/inner/memory.usage_in_bytes": "4096\n",
        }
    )
    assert sorted(_C.memory_left(version_1)) == [1_000_000, 8_192_000]
    assert _C.memory_left(tree({"proc/self/cgroup": "junk\n", "proc/self/mountinfo": "\n"})) == []
