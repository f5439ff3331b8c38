"""CUDA and NCCL: what is installed, found the way a program would find it. Needs neither."""

import ctypes
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from pycomm import _C
from pycomm.doctor.checks import Check


def gpu() -> list[Check]:
    return [toolkit(), kernels(), driver(), torch_cuda(), nccl()]


def toolkit() -> Check:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Check("CUDA toolkit", "absent", "no nvcc on PATH: builds leave the CUDA code out")
    return Check("CUDA toolkit", "ok", nvcc)


def kernels() -> Check:
    build = _C.cuda_build()
    if not build:
        return Check("CUDA kernels", "absent", "built without them (PYCOMM_CUDA)")
    return Check("CUDA kernels", "ok", f"built with {build}; tested on the CPU, not yet called by a back end")


def driver() -> Check:
    """The driver's version and its devices, asked of libcuda itself, so that torch's build does not matter."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Check("CUDA driver", "absent", "no libcuda.so.1")
    status = cuda.cuInit(0)
    if status != 0:
        return Check("CUDA driver", "warning", f"libcuda.so.1 is here, cuInit returns {status}", "look at nvidia-smi")
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for device in range(count.value):
        name = ctypes.create_string_buffer(128)
        cuda.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode())
    supports = f"up to CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return Check("CUDA driver", "ok" if names else "absent", f"{supports}; {', '.join(names) or 'no GPU'}")


def torch_cuda() -> Check:
    if torch.version.cuda is None:
        return Check("torch on GPUs", "absent", "this torch is built without CUDA")
    build = f"built for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return Check("torch on GPUs", "absent", f"{build}, sees no GPU")
    return Check("torch on GPUs", "ok", f"{build}, sees {torch.cuda.device_count()} GPU(s)")


def nccl() -> Check:
    """The first NCCL library that loads, and the version that it tells itself (not the one torch was built with)."""
    for name in nccl_candidates():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        status = library.ncclGetVersion(ctypes.byref(version))
        if status != 0:
            return Check("NCCL", "warning", f"{name}: ncclGetVersion returns {status}", "reinstall the library")
        return Check("NCCL", "ok", f"{decode_nccl_version(version.value)} ({name})")
    return Check("NCCL", "absent", "not found, neither as a Python package nor in the system")


def nccl_candidates() -> Iterator[str]:
    """The Python package's library, then the system's."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(root) / "nccl" / "lib" / "libnccl.so.2"
        if path.is_file():
            yield str(path)
    yield "libnccl.so.2"


def decode_nccl_version(code: int) -> str:
    """22809 is 2.28.9; before 2.9 the factors were a tenth: 2804 is 2.8.4."""
    major, rest = divmod(code, 10_000 if code >= 10_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"
