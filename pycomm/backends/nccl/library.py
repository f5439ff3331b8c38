"""Where NCCL and the CUDA driver are found. Loading NCCL needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator

from pycomm import _C, env
from pycomm.gpu.memory import in_wheels

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
    yield from in_wheels("nccl", NCCL)
    yield NCCL


def load_driver() -> _C.CudaDriver:
    """The CUDA driver.

    Raises:
        BackendUnavailableError: there is none, or it sees no GPU.
    """
    return _C.CudaDriver([DRIVER])
