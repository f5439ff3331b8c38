"""Where NCCL and the CUDA driver are found, and whether they can work here. Loading NCCL needs no GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pycomm import _C, env
from pycomm.errors import BackendUnavailableError

__all__ = ["Offer", "load_driver", "load_nccl", "nccl_candidates", "offer"]

NCCL = "libnccl.so.2"
DRIVER = "libcuda.so.1"


@dataclass(frozen=True)
class Offer:
    """What a rank brings to ``init(backend="nccl")``, for all ranks to see.

    Attributes:
        version: of NCCL, such as "2.28.9"; empty if there is none.
        obstacle: why NCCL cannot work on this rank; empty if it can.
    """

    version: str
    obstacle: str


def load_nccl() -> _C.NcclLibrary:
    """The first NCCL library that loads.

    Raises:
        BackendUnavailableError: none does, or it is too old; says why.
    """
    return _C.NcclLibrary(list(nccl_candidates()))


def nccl_candidates() -> Iterator[str]:
    """What to load, in this order: the one that the process has already (torch's own; two in a process would not know
    of each other), PYCOMM_NCCL_SO, the Python package's, the system's."""
    yield f"loaded:{NCCL}"
    named = env.nccl_library()
    if named is not None:
        yield named
        return  # what was asked for, or an error
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(root) / "nccl" / "lib" / NCCL
        if path.is_file():
            yield str(path)
    yield NCCL


def load_driver() -> _C.CudaDriver:
    """The CUDA driver.

    Raises:
        BackendUnavailableError: there is none, or it sees no GPU.
    """
    return _C.CudaDriver([DRIVER])


def offer() -> Offer:
    """Look whether this process can use NCCL. Initialises the CUDA driver, where there is one."""
    obstacles = []
    try:
        load_driver()
    except BackendUnavailableError as error:
        obstacles.append(f"there is no GPU: {error}")
    else:
        if torch.version.cuda is None:
            obstacles.append(f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of it")
        elif not torch.cuda.is_available():
            obstacles.append("torch sees no GPU: look at CUDA_VISIBLE_DEVICES and nvidia-smi")
    try:
        version = load_nccl().version
    except BackendUnavailableError as error:
        version = ""
        obstacles.append(f"{error}: pip install 'pycomm[cu13]' (or cu12, as torch's CUDA), or set PYCOMM_NCCL_SO")
    return Offer(version, "; ".join(obstacles))
