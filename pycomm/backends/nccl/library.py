"""Where NCCL and the CUDA driver are found. Loading NCCL needs no GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from pycomm import _C, env

__all__ = ["load_driver", "load_nccl", "nccl_candidates"]

NCCL = "libnccl.so.2"
DRIVER = "libcuda.so.1"


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
