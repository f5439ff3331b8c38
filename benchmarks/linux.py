"""What the benchmarks ask of Linux directly."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def cpu_model() -> str:
    """The processor's name as /proc/cpuinfo has it ("unknown" where it has none, as on some aarch64)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def mapped_shared_memory(pid: int) -> set[Path]:
    """The files of /dev/shm that a process maps now and that still have a name."""
    maps = Path("/proc", str(pid), "maps").read_text().splitlines()
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps if "/dev/shm/" in line}
    return {path for path in paths if path.exists()}


def available_memory_bytes() -> int:
    """What the kernel thinks can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")
