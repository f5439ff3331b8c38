"""Which process is meant, for the others of its host too: a number alone may be used again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "ancestors", "siblings"]

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process of any host.

    Attributes:
        host: its name, for people.
        boot: identifies one boot of one machine.
        namespace: in which ``pid`` is its number.
        start: when it started, in clock ticks after the boot.
    """

    host: str
    boot: str
    namespace: int
    pid: int
    start: int

    @classmethod
    def current(cls) -> Process:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process:
        """A process that can be seen from this one.

        Raises:
            OSError: there is none.
        """
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = (_PROC / "self/ns/pid").stat().st_ino
        return cls(socket.gethostname(), boot, namespace, pid, _Stat.of(pid).start)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_running(self) -> bool | None:
        """None where it cannot be seen: on another host, or among processes that are numbered apart."""
        mine = Process.current()
        if (self.boot, self.namespace) != (mine.boot, mine.namespace):
            return None
        try:
            stat = _Stat.of(self.pid)
        except OSError:
            return False
        return stat.start == self.start and stat.state not in "ZX"

    def is_relative(self) -> bool:
        """Whether it is an ancestor or a descendant of this process, or this process. For one that is running."""
        me = Process.current()
        return self == me or self in ancestors() or me in ancestors(self.pid)


@dataclass(frozen=True)
class _Stat:
    """Some fields of /proc/PID/stat."""

    state: str
    parent: int
    start: int

    @classmethod
    def of(cls, pid: int) -> _Stat:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()  # the name before may hold anything
        return cls(fields[0], int(fields[1]), int(fields[19]))


def siblings() -> Iterator[int]:
    """Other processes that this one's parent started with the same command line."""
    command = (_PROC / "self/cmdline").read_bytes()
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if _Stat.of(int(entry.name)).parent == os.getppid() and (entry / "cmdline").read_bytes() == command:
                yield int(entry.name)
        except OSError:  # it has ended, or hides
            continue


def ancestors(pid: int | None = None) -> Iterator[Process]:
    """The parent of a process, of this one by default, its parent, and so on, as far as they can be seen."""
    pid = os.getpid() if pid is None else pid
    try:
        while pid > 1:
            pid = _Stat.of(pid).parent
            if pid > 0:
                yield Process.of(pid)
    except OSError:
        return
