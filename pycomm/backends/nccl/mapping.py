"""How the ranks of a group come to map each other's memory, or agree that they do not.

On one host CUDA's handles of memory go over the host transport's sockets. On several, in one NVLink domain, it is
NCCL's windows. Every step that may fail on a rank is followed by a word with all others, so that all go on, or none.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pycomm import _C
from pycomm.backends import Backend
from pycomm.backends.agreement import all_or_none, by_reason
from pycomm.backends.nccl.gpu import Gpu
from pycomm.backends.nccl.symmetric import Symmetric
from pycomm.backends.nccl.thresholds import Thresholds
from pycomm.backends.shm import ShmBackend
from pycomm.errors import BackendUnavailableError

__all__ = ["Mapper"]

_TEXT_BYTES = 240
_ABILITIES = struct.Struct(f"<i?40s{_TEXT_BYTES}s")  # multiprocessors, windows, the GPU's UUID, obstacle

Result = TypeVar("Result")


@dataclass
class Mapper:
    """What a rank needs to allocate symmetric memory.

    Attributes:
        desk: a group of the same ranks on the host.
        agree: that of :class:`pycomm.backends.nccl.NcclBackend`.
    """

    core: _C.NcclCommunicator
    library: _C.NcclLibrary
    gpu: Gpu
    desk: Backend
    agree: Callable[[bytes, float], list[bytes]]

    def agreed(self, thresholds: Thresholds, timeout_s: float) -> tuple[Symmetric | None, str]:
        """What there is where ranks map each other's memory, and a sentence about it, the same on all. Collective."""
        try:
            return self._symmetric(thresholds, timeout_s), f"all-reduces {thresholds}"
        except (BackendUnavailableError, MemoryError) as error:
            return None, f"not used: {error}"

    def _symmetric(self, thresholds: Thresholds, timeout_s: float) -> Symmetric:
        """Pads, staging and kernels of this group. Collective.

        Raises:
            BackendUnavailableError, MemoryError: they cannot be had; on all ranks, with the reason.
        """
        if self.desk.world_size > _C.MAX_KERNEL_RANKS:
            raise BackendUnavailableError(f"{self.desk.world_size} ranks: kernels serve {_C.MAX_KERNEL_RANKS} at most")
        obstacle = self.gpu.kernel_obstacle()
        num, uuid = (0, "") if obstacle else (self.gpu.num_multiprocessors(), self.gpu.uuid())
        row = _ABILITIES.pack(num, self.library.has_windows, uuid.encode(), _cut(obstacle))
        nums, windows, uuids, obstacles = zip(*map(_ABILITIES.unpack, self.agree(row, timeout_s)), strict=True)
        texts = [_text(text) for text in obstacles]
        if not isinstance(self.desk, ShmBackend):
            no_windows = "several hosts need windows, which NCCL has from 2.29 on"
            texts = [text or ("" if has else no_windows) for text, has in zip(texts, windows, strict=True)]
        if any(texts):
            raise BackendUnavailableError(by_reason(texts))
        num = min(nums)
        self._all_or_none(lambda: self.gpu.check_reaches([_text(uuid) for uuid in uuids]), timeout_s)
        memory = self.memory(self.gpu.kernel_memory_bytes(thresholds.one_shot_bytes, num), timeout_s)
        rank = self.desk.rank
        kernels = self._all_or_none(lambda: self.gpu.kernels(memory, rank, num, timeout_s), timeout_s)
        self.core.watch_kernels(kernels.abort_word, kernels.status, kernels)
        return Symmetric(rank, kernels, thresholds, self.gpu.tensors)

    def memory(self, num_bytes: int, timeout_s: float) -> _C.GpuMemory:
        """Allocate memory on every rank, which is zero. Collective.

        Raises:
            BackendUnavailableError, MemoryError: a rank cannot have or map it; on all ranks.
        """
        desk, gpu = self.desk, self.gpu
        if isinstance(desk, ShmBackend):
            host = desk.host()
            return self._all_or_none(lambda: gpu.shared_memory(host, num_bytes, timeout_s), timeout_s)
        window = self._all_or_none(lambda: _C.NcclWindow(self.core, num_bytes), timeout_s)
        self._all_or_none(lambda: window.open(timeout_s), timeout_s)
        return self._all_or_none(lambda: gpu.window_memory(window), timeout_s)

    def _all_or_none(self, attempt: Callable[[], Result], timeout_s: float) -> Result:
        return all_or_none(attempt, lambda row: self.agree(row, timeout_s), BackendUnavailableError)


def _cut(text: str) -> bytes:
    return text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")


def _text(row: bytes) -> str:
    return row.rstrip(b"\0").decode(errors="ignore")
