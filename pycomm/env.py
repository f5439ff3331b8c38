"""The only reader of environment variables. Each function says which ones it reads."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Launch",
    "cache_dir",
    "elastic_error_file",
    "export_num_threads",
    "gloo_interface",
    "is_ci",
    "launch",
    "nccl_library",
    "simd",
    "tune",
]


@dataclass(frozen=True)
class Launch:
    """What a launcher (torchrun, or one that sets the same variables) says of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    run_id: str
    restart: int
    agent_store: bool  # torchrun's agent already serves a TCPStore at master_addr:master_port


def launch() -> Launch | None:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and torchrun's TORCHELASTIC_RUN_ID,
    TORCHELASTIC_RESTART_COUNT and TORCHELASTIC_USE_AGENT_STORE.

    Returns:
        None without RANK and WORLD_SIZE: this process was not launched as one of several.

    Raises:
        ValueError: a variable is missing or no number; the message names it.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank} is not below WORLD_SIZE={world_size}")
    if world_size > 1 or "MASTER_ADDR" in os.environ:
        master_addr, master_port = _text("MASTER_ADDR"), _number("MASTER_PORT")
        if not 0 < master_port < 1 << 16:
            raise ValueError(f"MASTER_PORT={master_port} is no port: it must be from 1 to 65535")
    else:
        master_addr, master_port = "127.0.0.1", 0
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", rank),
        local_world_size=_number("LOCAL_WORLD_SIZE", world_size),
        master_addr=master_addr,
        master_port=master_port,
        run_id=os.environ.get("TORCHELASTIC_RUN_ID", "none"),
        restart=_number("TORCHELASTIC_RESTART_COUNT", 0),
        agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def simd() -> str | None:
    """PYCOMM_SIMD: force a SIMD level ("baseline", "avx2", "avx512") instead of the best one."""
    return os.environ.get("PYCOMM_SIMD")


def tune() -> dict[str, int]:
    """PYCOMM_TUNE: thresholds of the host transport in bytes, such as "slice_bytes=128K,one_shot_bytes=8192" (K and M:
    times 1024, 1024 * 1024). Empty if it is not set.

    Raises:
        ValueError: it does not read so, or names a threshold twice.
    """
    thresholds: dict[str, int] = {}
    text = os.environ.get("PYCOMM_TUNE", "")
    for item in filter(None, (item.strip() for item in text.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(\d{1,12})([KM]?)", item)
        if match is None:
            raise ValueError(
                f"PYCOMM_TUNE={text!r}: {item!r} does not read like slice_bytes=131072 or slice_bytes=128K"
            )
        name, number, unit = match.groups()
        if name in thresholds:
            raise ValueError(f"PYCOMM_TUNE={text!r} names {name} twice")
        thresholds[name] = int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit]
    return thresholds


def cache_dir() -> Path:
    """PYCOMM_CACHE_DIR, else XDG_CACHE_HOME/pycomm, else ~/.cache/pycomm. Not created. An empty variable is none."""
    own = os.environ.get("PYCOMM_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pycomm"


def gloo_interface() -> str | None:
    """GLOO_SOCKET_IFNAME, as torch reads it: the network interface that connects this host to the others."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or None


def nccl_library() -> str | None:
    """PYCOMM_NCCL_SO: the NCCL library to load, a file or a name that the loader knows."""
    return os.environ.get("PYCOMM_NCCL_SO") or None


def is_ci() -> bool:
    """CI: "true" or "1" under continuous integration."""
    return os.environ.get("CI", "").lower() in ("true", "1")


def elastic_error_file() -> Path | None:
    """TORCHELASTIC_ERROR_FILE: where torch's launcher wants a failed worker's traceback; None without a launcher."""
    value = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(value) if value else None


def export_num_threads(num_threads: int) -> None:
    """Set OMP_NUM_THREADS for the processes that this one starts, unless the user has set it."""
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))


def _text(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(
            f"{name} is not set, but RANK or WORLD_SIZE is: start the processes with torchrun, "
            f"or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT on each"
        )
    return value


def _number(name: str, default: int | None = None) -> int:
    if default is not None and not os.environ.get(name):
        return default
    text = _text(name)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a whole number") from None
