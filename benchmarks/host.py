"""The machine that a result was measured on: goes in the header and in the JSON, since no figure means much without."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from linux import cores, cpu_model

_BUSY_LOAD_PER_CORE = 0.3


def describe_host() -> dict[str, object]:
    """Processor, cores this process may use, memory in GiB, kernel, Python, torch, one-minute load."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gib": round(pages / 2**30, 1),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def load_warning() -> str | None:
    """One line when the machine is not idle, else None. The load average lags by about a minute."""
    load = os.getloadavg()[0]
    if load <= _BUSY_LOAD_PER_CORE * cores():
        return None
    return f"warning: the machine is busy (load {load:.2f} on {cores()} cores); these figures will not repeat"
