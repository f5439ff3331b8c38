"""NCCL is found and its version read without a GPU, and our declarations of it are its own."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pycomm
from pycomm import _C
from pycomm.backends import choose
from pycomm.backends.nccl import library
from pycomm.doctor import gpu
from pycomm.errors import BackendUnavailableError

ROOT = Path(__file__).resolve().parents[2]


def wheel() -> Path:
    """The folder of NCCL's Python package; skips the test where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec is not None else None) or ():
        if (Path(root) / "nccl" / "lib" / "libnccl.so.2").is_file():
            return Path(root) / "nccl"
    pytest.skip("nvidia-nccl-cu12 or nvidia-nccl-cu13 is not installed")


def test_the_wheel_is_found_and_its_version_read() -> None:
    file = wheel() / "lib" / "libnccl.so.2"
    found = library.load_nccl()
    assert Path(found.file).samefile(file)
    version = ctypes.c_int()
    assert ctypes.CDLL(str(file)).ncclGetVersion(ctypes.byref(version)) == 0
    assert found.version_code == version.value
    check = gpu.nccl()
    assert check.status == "ok"
    assert found.version in check.detail
    assert found.has_windows == (found.version_code >= 22900)
    assert found.file in check.detail


def test_the_library_named_by_the_environment_is_an_error_if_it_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCOMM_NCCL_SO", "/nowhere/libnccl.so.2")
    assert list(library.nccl_candidates()) == ["loaded:libnccl.so.2", "/nowhere/libnccl.so.2"]
    with pytest.raises(BackendUnavailableError, match="NCCL cannot be loaded: /nowhere/libnccl.so.2"):
        _C.NcclLibrary(["/nowhere/libnccl.so.2"])


def test_another_library_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="has no ncclGetVersion"):
        _C.NcclLibrary(["libc.so.6"])
    with pytest.raises(BackendUnavailableError, match="has no cuInit"):
        _C.CudaDriver(["libc.so.6"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_init_says_so() -> None:
    with pytest.raises(BackendUnavailableError, match="there is no GPU"):
        pycomm.init("nccl")


def test_ranks_that_cannot_use_nccl_are_named_on_all() -> None:
    hosts = ["a"] * 4
    assert choose("nccl", hosts, [""] * 4).name == "nccl"
    with pytest.raises(BackendUnavailableError, match=r"^backend='nccl': no GPU \(rank 0, 3\); no NCCL \(rank 1\)$"):
        choose("nccl", hosts, ["no GPU", "no NCCL", "", "no GPU"])


ABI_CHECK = r"""
#include <cuda.h>
#include <nccl.h>
#include <cstddef>
#include <type_traits>
#include "nccl/abi.hpp"
namespace ours = pycomm::nccl::abi;
namespace driver = pycomm::nccl::driver::abi;

#define SAME_VALUE(a, b) static_assert(static_cast<int>(a) == static_cast<int>(b))
SAME_VALUE(ours::kSuccess, ncclSuccess);
SAME_VALUE(ours::kUnhandledCudaError, ncclUnhandledCudaError);
SAME_VALUE(ours::kSystemError, ncclSystemError);
SAME_VALUE(ours::kInternalError, ncclInternalError);
SAME_VALUE(ours::kInvalidArgument, ncclInvalidArgument);
SAME_VALUE(ours::kInvalidUsage, ncclInvalidUsage);
SAME_VALUE(ours::kRemoteError, ncclRemoteError);
SAME_VALUE(ours::kInProgress, ncclInProgress);
SAME_VALUE(ours::kInt8, ncclInt8);
SAME_VALUE(ours::kUint8, ncclUint8);
SAME_VALUE(ours::kInt32, ncclInt32);
SAME_VALUE(ours::kInt64, ncclInt64);
SAME_VALUE(ours::kFloat16, ncclFloat16);
SAME_VALUE(ours::kFloat32, ncclFloat32);
SAME_VALUE(ours::kFloat64, ncclFloat64);
SAME_VALUE(ours::kBfloat16, ncclBfloat16);
SAME_VALUE(ours::kSum, ncclSum);
SAME_VALUE(ours::kProd, ncclProd);
SAME_VALUE(ours::kMax, ncclMax);
SAME_VALUE(ours::kMin, ncclMin);
SAME_VALUE(ours::kAvg, ncclAvg);
SAME_VALUE(ours::kUndefined, NCCL_CONFIG_UNDEF_INT);
SAME_VALUE(ours::kNoColor, NCCL_SPLIT_NOCOLOR);
static_assert(ours::kMagic == NCCL_API_MAGIC);
static_assert(sizeof(ours::UniqueId) == sizeof(ncclUniqueId));

#define SAME_PLACE(a, b) static_assert(offsetof(ours::Config, a) == offsetof(ncclConfig_t, b))
SAME_PLACE(size, size);
SAME_PLACE(magic, magic);
SAME_PLACE(version, version);
SAME_PLACE(blocking, blocking);
SAME_PLACE(cga_cluster_size, cgaClusterSize);
SAME_PLACE(min_ctas, minCTAs);
SAME_PLACE(max_ctas, maxCTAs);
SAME_PLACE(net_name, netName);
SAME_PLACE(split_share, splitShare);
static_assert(sizeof(ours::Config) <= sizeof(ncclConfig_t));

#if NCCL_VERSION_CODE >= 23100
#define SAME_PLACE_OF_CALL(a, b) static_assert(offsetof(ours::CollConfig, a) == offsetof(ncclCollConfig_t, b))
SAME_PLACE_OF_CALL(extensions, ext);
SAME_PLACE_OF_CALL(min_ctas, minCTAs);
SAME_PLACE_OF_CALL(max_ctas, maxCTAs);
SAME_PLACE_OF_CALL(nvls_ctas, nvlsCTAs);
SAME_PLACE_OF_CALL(cga_cluster_size, cgaClusterSize);
SAME_PLACE_OF_CALL(algorithms, algSelection);
SAME_PLACE_OF_CALL(force_algorithms, forceAlgSelection);
SAME_PLACE_OF_CALL(cta_policy, CTAPolicy);
SAME_PLACE_OF_CALL(profiler_tag, userProfilerTag);
static_assert(sizeof(ours::CollConfig) <= sizeof(ncclCollConfig_t));
#endif

#if NCCL_VERSION_CODE >= 22900
#include <nccl_device/host.h>
SAME_VALUE(ours::kWindowCollectiveSymmetric, NCCL_WIN_COLL_SYMMETRIC);
#define SAME_TYPE(function, type) static_assert(std::is_same_v<decltype(&function), type>)
SAME_TYPE(ncclMemAlloc, ncclResult_t (*)(void**, size_t));
SAME_TYPE(ncclMemFree, ncclResult_t (*)(void*));
SAME_TYPE(ncclCommWindowRegister, ncclResult_t (*)(ncclComm_t, void*, size_t, ncclWindow_t*, int));
SAME_TYPE(ncclCommWindowDeregister, ncclResult_t (*)(ncclComm_t, ncclWindow_t));
SAME_TYPE(ncclGetPeerDevicePointer, ncclResult_t (*)(ncclWindow_t, size_t, int, void**));
static_assert(std::is_pointer_v<ncclWindow_t>);
#endif

static_assert(sizeof(driver::Uuid) == sizeof(CUuuid));
SAME_VALUE(driver::kSuccess, CUDA_SUCCESS);
SAME_VALUE(driver::kNoDevice, CUDA_ERROR_NO_DEVICE);
SAME_VALUE(driver::kNotReady, CUDA_ERROR_NOT_READY);
SAME_VALUE(driver::kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
SAME_VALUE(driver::kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
SAME_VALUE(driver::kNotCapturing, CU_STREAM_CAPTURE_STATUS_NONE);
SAME_VALUE(driver::kCaptureRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(sizeof(driver::DevicePointer) == sizeof(CUdeviceptr));
static_assert(std::is_same_v<driver::Stream, CUstream> && std::is_same_v<driver::Event, CUevent>);
"""


def test_declarations_are_those_of_the_header(tmp_path: Path) -> None:
    header = wheel() / "include"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no CUDA toolkit, whose headers NCCL's needs")
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=True, timeout=60)
    toolkit = Path(re.findall(r"TOP=(\S+)", dry_run.stderr)[0])
    includes = [header, toolkit / "include", ROOT / "csrc", ROOT / "csrc" / "include"]
    source = tmp_path / "abi_check.cpp"
    source.write_text(ABI_CHECK)
    command = ["c++", "-std=c++20", "-fsyntax-only", *(f"-I{folder}" for folder in includes), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
