"""The GPU of this process: its context, and the stream that its torch code runs on now."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pycomm import _C, env
from pycomm.backends.nccl.kernels import Kernels
from pycomm.backends.nccl.library import load_driver
from pycomm.backends.nccl.symmetric import AllReduceKernel
from pycomm.errors import BackendUnavailableError
from pycomm.gpu.memory import tensors_of

__all__ = ["Gpu", "index_of_this_rank"]


class Gpu:
    """What the back end needs of a device.

    Args:
        index: of the device, as torch counts them.
    """

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.driver = load_driver()
        self.core = _C.CudaDevice(self.driver, index)

    @classmethod
    def of_this_rank(cls, device: torch.device | None = None) -> Gpu:
        """``device``; for None that of :func:`index_of_this_rank`, which becomes torch's current device.

        Raises:
            ValueError: there is no such device.
        """
        if device is not None:
            return cls(device.index)
        index = index_of_this_rank()
        torch.cuda.set_device(index)
        return cls(index)

    def current_stream(self) -> int:
        """The driver's handle of torch's current stream on this device."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    # Memory that ranks map, and pycomm's own kernels on it.

    def kernel_obstacle(self) -> str:
        """Why this process has no kernels of pycomm's; empty: it has."""
        return "" if _C.cuda_build() else "this build of pycomm has no CUDA code (PYCOMM_CUDA=ON has)"

    def num_multiprocessors(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    def uuid(self) -> str:
        return self.driver.device_uuid(self.device.index)

    def check_reaches(self, uuids: Sequence[str]) -> None:
        """Of other ranks' GPUs. Those that this process does not see it cannot ask about: mapping them says it.

        Raises:
            BackendUnavailableError: this GPU cannot access one of them.
        """
        for index in range(torch.cuda.device_count()):
            is_other = index != self.device.index and self.driver.device_uuid(index) in uuids
            if is_other and not torch.cuda.can_device_access_peer(self.device, index):
                raise BackendUnavailableError(f"{self.device} cannot access the memory of cuda:{index}")

    def shared_memory(self, host: _C.HostCommunicator, num_bytes: int, timeout_s: float) -> _C.GpuMemory:
        """Of every rank of one host: collective."""
        return _C.GpuMemory.processes(host, self.device.index, num_bytes, timeout_s)

    def window_memory(self, window: _C.NcclWindow) -> _C.GpuMemory:
        """What an open window of NCCL's has: collective; nobody may use it before all have it."""
        return _C.GpuMemory.window(window, self.device.index)

    def kernel_memory_bytes(self, one_shot_bytes: int, num_multiprocessors: int) -> int:
        return Kernels.memory_bytes(one_shot_bytes, num_multiprocessors)

    def kernels(self, memory: _C.GpuMemory, rank: int, num_multiprocessors: int, timeout_s: float) -> AllReduceKernel:
        return Kernels(memory, self.device, rank, num_multiprocessors, timeout_s)

    def tensors(
        self, memory: _C.GpuMemory, shape: Sequence[int], dtype: torch.dtype, offset: int
    ) -> list[torch.Tensor]:
        return tensors_of(memory, self.device, shape, dtype, offset)


def index_of_this_rank() -> int:
    """The device that the program has made current with ``torch.cuda.set_device``, else number LOCAL_RANK.

    Raises:
        ValueError: there is no such device.
    """
    launched, num_devices = env.launch(), torch.cuda.device_count()
    index = torch.cuda.current_device()
    if index != 0 or launched is None or num_devices == 1:
        return index
    if launched.local_rank >= num_devices:
        raise ValueError(
            f"LOCAL_RANK={launched.local_rank}, but torch sees {num_devices} GPU(s): start as many ranks as there are, "
            f"or choose a device with torch.cuda.set_device() before init()"
        )
    return launched.local_rank
