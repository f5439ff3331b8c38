"""CUDA and NCCL: what is installed, found the way a program would find it. Needs neither."""

import shutil
from collections.abc import Sequence

import torch

from pycomm import _C
from pycomm.backends.nccl.library import load_driver, load_nccl
from pycomm.backends.nccl.thresholds import Thresholds
from pycomm.doctor.checks import Check
from pycomm.errors import BackendUnavailableError


def gpu() -> list[Check]:
    return [toolkit(), kernels(), driver(), torch_cuda(), nccl(), own_kernels()]


def toolkit() -> Check:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Check("CUDA toolkit", "absent", "no nvcc on PATH: builds leave the CUDA code out")
    return Check("CUDA toolkit", "ok", nvcc)


def kernels() -> Check:
    build = _C.cuda_build()
    if not build:
        return Check("CUDA kernels", "absent", "built without them (PYCOMM_CUDA)")
    return Check("CUDA kernels", "ok", f"built with {build}; tested on the CPU, not yet measured on GPUs")


def driver() -> Check:
    """The driver's version and its devices, asked of libcuda itself, so that torch's build does not matter."""
    try:
        cuda = load_driver()
    except BackendUnavailableError as error:
        return Check("CUDA driver", "absent", str(error))
    supports = f"up to CUDA {cuda.version // 1000}.{cuda.version % 1000 // 10}"
    return Check("CUDA driver", "ok", f"{supports}; {', '.join(cuda.device_names())}")


def torch_cuda() -> Check:
    if torch.version.cuda is None:
        return Check("torch on GPUs", "absent", "this torch is built without CUDA")
    build = f"built for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return Check("torch on GPUs", "absent", f"{build}, sees no GPU")
    return Check("torch on GPUs", "ok", f"{build}, sees {torch.cuda.device_count()} GPU(s)")


def nccl() -> Check:
    """The NCCL library that ``init(backend="nccl")`` would use, and the version that it tells itself (not the one torch
    was built with)."""
    try:
        library = load_nccl()
    except BackendUnavailableError as error:
        return Check("NCCL", "absent", str(error))
    budget = "" if library.has_call_config else "; no CTA budgets of single calls (2.31)"
    return Check("NCCL", "ok", f"{library.version} ({library.file}){budget}")


def own_kernels(world_sizes: Sequence[int] = (2, 4, 8)) -> Check:
    """Which all-reduces pycomm's kernels do, and which NCCL, by the number of ranks."""
    try:
        tables = [(size, Thresholds.of_this_process(size)) for size in world_sizes]
    except ValueError as error:
        return Check("own kernels or NCCL", "failed", str(error), "correct PYCOMM_TUNE")
    text = "; ".join(f"{size} ranks: {table}" for size, table in tables)
    if not _C.cuda_build():
        text = f"NCCL alone, since this build has no CUDA kernels (PYCOMM_CUDA); with them, {text}"
        return Check("own kernels or NCCL", "absent", text)
    return Check("own kernels or NCCL", "ok", f"all-reduces of ranks that map each other's GPUs: {text}")
