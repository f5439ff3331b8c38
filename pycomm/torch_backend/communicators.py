"""The communicators of one process group: the host's for CPU tensors, NCCL's for CUDA tensors."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist

from pycomm import communicator
from pycomm.communicator import Communicator
from pycomm.errors import BackendUnavailableError

__all__ = ["Communicators"]


class Communicators:
    """See the module. NCCL's is made with the first CUDA tensor, or by :meth:`on`: all ranks of the group take part.

    Args:
        store: the group's own, for ranks to meet over.
        host: of the ranks of the group, for CPU tensors.
        gpu: the same for CUDA tensors, where it exists.
    """

    def __init__(self, store: dist.Store, host: Communicator, gpu: Communicator | None = None) -> None:
        self.store = store
        self.host = host
        self._gpu = gpu
        self._lock = threading.Lock()  # any thread may bring the first CUDA tensor

    @classmethod
    def connect(cls, store: dist.Store, rank: int, world_size: int, timeout_s: float, name: str) -> Communicators:
        """Meet the other ranks on the host."""
        host = communicator.init("host", timeout_s=timeout_s, store=store, rank=rank, world_size=world_size, name=name)
        return cls(store, host)

    def of(self, tensor: torch.Tensor) -> Communicator:
        """Which takes ``tensor``; see :meth:`on`."""
        return self.host if tensor.is_cpu else self.on(tensor.device)

    def on(self, device: torch.device) -> Communicator:
        """Which takes tensors on ``device``.

        Raises:
            BackendUnavailableError: it is neither the CPU nor a GPU that NCCL can use; says why.
            PeerTimeoutError: NCCL's is to be made, and other ranks did not come to that.
        """
        if device.type == "cpu":
            return self.host
        if device.type != "cuda":
            raise BackendUnavailableError(
                f"a tensor on {device}: the back end pycomm serves CPU tensors and, over NCCL, CUDA tensors"
            )
        with self._lock:
            if self._gpu is None:
                index = torch.cuda.current_device() if device.index is None else device.index
                self._gpu = communicator.init(
                    "nccl",
                    timeout_s=self.host.timeout_s,
                    store=dist.PrefixStore("cuda", self.store),
                    rank=self.host.rank,
                    world_size=self.host.world_size,
                    name=f"{self.host.name} (cuda)",
                    device=torch.device("cuda", index),
                )
            return self._gpu

    def split(self, color: int | None, key: int, store: dist.Store) -> Communicators | None:
        """As :meth:`Communicator.split`, of those that exist on all ranks."""
        host = self.host.split(color, key)
        gpu = None if self._gpu is None else self._gpu.split(color, key)
        return None if host is None else Communicators(store, host, gpu)

    def abort(self, reason: str) -> None:
        for comm in self._all():
            comm.abort(reason)

    def close(self) -> None:
        for comm in self._all():
            comm.close()

    def _all(self) -> list[Communicator]:
        return [self.host] if self._gpu is None else [self._gpu, self.host]
