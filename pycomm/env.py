"""The only reader of environment variables. Each function says which ones it reads."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pycomm.process import ancestors

__all__ = [
    "Launch",
    "cache_dir",
    "elastic_error_file",
    "export_num_threads",
    "gloo_interface",
    "is_ci",
    "launch",
    "launch_of",
    "nccl_library",
    "simd",
    "tasks_elsewhere",
    "tune",
]


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process: torchrun, one that sets the same variables, MPI's mpirun or SLURM's srun.

    Attributes:
        job: the launcher's own name of the job; empty where only addresses tell jobs apart.
        agent_store: torchrun's agent already serves a TCPStore at master_addr:master_port.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    job: str = ""
    restart: int = 0
    agent_store: bool = False

    @property
    def where(self) -> str:
        return f"MASTER_ADDR={self.master_addr} MASTER_PORT={self.master_port}"


def launch() -> Launch | None:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and torchrun's TORCHELASTIC_RUN_ID,
    TORCHELASTIC_RESTART_COUNT and TORCHELASTIC_USE_AGENT_STORE; without RANK and WORLD_SIZE, what mpirun or srun sets
    (``_LAUNCHERS`` lists it).

    Returns:
        None: this process was not launched as one of several.

    Raises:
        ValueError: a variable is missing, contradicts another one or is no number; the message names it.
    """
    return _launch(os.environ)


def launch_of(pid: int) -> Launch | None:
    """What another process of this user was launched with; None if nothing, or if that cannot be seen."""
    try:
        return _launch(_environ_of(pid))
    except (OSError, ValueError):
        return None


def tasks_elsewhere() -> int:
    """SLURM_NTASKS, of a process that is none of these tasks (a batch script, or the shell of salloc); 1 otherwise."""
    if "SLURM_STEP_NUM_TASKS" in os.environ or launch() is not None:
        return 1
    number = os.environ.get("SLURM_NTASKS", "")
    return int(number) if number.isascii() and number.isdigit() else 1


def _launch(environ: Mapping[str, str]) -> Launch | None:
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return _launch_by_tasks(environ)
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank} is not below WORLD_SIZE={world_size}")
    if world_size > 1 or "MASTER_ADDR" in environ:
        master_addr, master_port = _text(environ, "MASTER_ADDR"), _port(environ)
    else:
        master_addr, master_port = "127.0.0.1", 0
    run_id = environ.get("TORCHELASTIC_RUN_ID", "none")
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", rank),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", world_size),
        master_addr=master_addr,
        master_port=master_port,
        job="" if run_id == "none" else run_id,
        restart=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


@dataclass(frozen=True)
class _Tasks:
    """The variables by which a launcher of tasks numbers them. ``local_size``, ``job``: empty where it has none."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...]
    to_set: str  # how to hand a variable to all tasks


# The innermost first: mpirun starts its daemons by srun, whose variables the ranks inherit.
_LAUNCHERS = (
    _Tasks(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE",),
        "mpirun -x NAME=value",
    ),
    _Tasks(
        "mpiexec (PMI)",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        (),
        "mpiexec -genv NAME value",
    ),
    _Tasks(
        "srun",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",  # not SLURM_NTASKS, which a batch script and the shell of salloc have, too
        "SLURM_LOCALID",
        "",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
        "export NAME=value before srun",
    ),
)
_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below those that the kernel hands out


def _launch_by_tasks(environ: Mapping[str, str]) -> Launch | None:
    """One of several tasks of mpirun or srun. A single task is a world of one, as without a launcher."""
    tasks = next((t for t in _LAUNCHERS if t.rank in environ and t.size in environ), None)
    if tasks is None:
        if "PMIX_RANK" in environ:
            raise ValueError(
                f"PMIX_RANK={environ['PMIX_RANK']}: a launcher has started this process as one of several, but says "
                f"not of how many: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
            )
        return None
    rank, size = _number(environ, tasks.rank), _number(environ, tasks.size)
    if not 0 <= rank < size:
        raise ValueError(f"{tasks.rank}={rank} is not below {tasks.size}={size}")
    if size == 1:
        return None
    local_size = _slurm_local_size(environ) if not tasks.local_size else _number(environ, tasks.local_size, 0)
    job = ".".join(environ.get(name, "") for name in tasks.job).strip(".")
    if not job and local_size == size:
        job = _launcher_process(environ, tasks.rank)
    return Launch(
        rank=rank,
        world_size=size,
        local_rank=_number(environ, tasks.local_rank, rank),
        local_world_size=local_size or size,
        master_addr=environ.get("MASTER_ADDR", "") or _first_host(environ, tasks, local_size == size),
        master_port=_port(environ) if environ.get("MASTER_PORT") else _port_of(job, tasks),
        job=job,
    )


def _slurm_local_size(environ: Mapping[str, str]) -> int:
    """Tasks of this step on this host, of "4", "2(x3)" or "2(x3),1" by host; 0 if unknown."""
    counts: list[int] = []
    for item in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", item)
        if match is None:
            return 0
        counts += [int(match[1])] * int(match[2] or 1)
    host = _number(environ, "SLURM_NODEID", 0)
    return counts[host] if 0 <= host < len(counts) else 0


def _first_host(environ: Mapping[str, str], tasks: _Tasks, one_host: bool) -> str:
    if one_host:
        return "127.0.0.1"
    # "node[01-04,07],login" begins with node01.
    match = re.match(r"([^\[,\s]+)(?:\[(\w+)[^\]]*\]([^,\s]*))?", environ.get("SLURM_STEP_NODELIST", ""))
    if tasks.launcher == "srun" and match is not None:
        return "".join(part or "" for part in match.groups())
    raise ValueError(
        f"{tasks.launcher} has started {environ[tasks.size]} processes on several hosts, of which this is number "
        f"{environ[tasks.rank]}: set MASTER_ADDR to the host of number 0 for all of them ({tasks.to_set})"
    )


def _port_of(job: str, tasks: _Tasks) -> int:
    """The same port on all ranks of a job, another one for most other jobs; pycomm notices where two have the same."""
    if not job:
        raise ValueError(
            f"{tasks.launcher} has started several processes and does not name their job: set MASTER_PORT to one free "
            f"port for all of them ({tasks.to_set})"
        )
    return _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS


def _launcher_process(environ: Mapping[str, str], variable: str) -> str:
    """The nearest ancestor that is not a task itself: on one host, the same one for all tasks of a job."""
    for ancestor in ancestors():
        try:
            if variable not in _environ_of(ancestor.pid):
                return f"{ancestor.pid}-{ancestor.start}"
        except OSError:  # another user's
            return f"{ancestor.pid}-{ancestor.start}"
    return ""


def _environ_of(pid: int) -> dict[str, str]:
    """What a process was started with."""
    text = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "surrogateescape")
    pairs = (item.partition("=") for item in text.split("\0"))
    return {name: value for name, sign, value in pairs if sign}


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


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise ValueError(
            f"{name} is not set, but RANK or WORLD_SIZE is: start the processes with torchrun, "
            f"or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT on each"
        )
    return value


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environ.get(name):
        return default
    text = _text(environ, name)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a whole number") from None


def _port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT={port} is no port: it must be from 1 to 65535")
    return port
