"""NumPy's elements on the GPU and back; a bfloat16 is its bits there (tests/host/reduce_reference.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import pycomm
from pycomm import Communicator
from pycomm.backends import Capabilities
from pycomm.communicator import _known
from tests.host.reduce_reference import STORAGE, Raw
from tests.pool import file_store

KERNEL_TIMEOUT_S = 30.0  # of waits that should end at once


def to_gpu(dtype: str, raw: Raw) -> torch.Tensor:
    """A tensor of its own on the current GPU."""
    if raw.size == 0:
        return torch.empty(0, dtype=getattr(torch, dtype), device="cuda")
    plain = torch.from_numpy(np.ascontiguousarray(raw).view(np.uint8).copy()).cuda()
    return plain.view(getattr(torch, dtype))


def from_gpu(dtype: str, tensor: torch.Tensor) -> Raw:
    plain = tensor.detach().contiguous().view(torch.uint8).cpu().numpy()
    return plain.view(STORAGE[dtype])


class SharedGpu:
    """Ranks that are processes of one GPU, as a communicator of CUDA tensors; NCCL takes one rank a GPU.

    It has what products with communication ask of one, staged through the host, and the ranks' mapped memory is real.
    """

    capabilities = Capabilities(orders_on_device=True)

    def __init__(self, host: Communicator) -> None:
        self.rank, self.world_size, self.name = host.rank, host.world_size, host.name
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.timeout_s, self.attached = host.timeout_s, {}
        self.key = _known().add(self)
        self._host = host

    def _leave(self, drain_s: float) -> None:
        """At interpreter exit; the host's communicator leaves."""

    def on_host(self) -> Communicator | None:
        return self._host.split(0)

    def agree(self, row: Sequence[int]) -> list[list[int]]:
        return self._host.agree(row)

    def all_or_none(self, action: Callable[[], Any]) -> Any:
        return self._host.all_or_none(action)

    def when_it_fails(self, callback: Callable[[], None]) -> None:
        pass

    def all_reduce(self, tensor: torch.Tensor, *, async_op: bool = False) -> None:
        staged = tensor.cpu()
        self._host.all_reduce(staged)
        tensor.copy_(staged)

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, *, input_splits: Sequence[int], async_op: bool = False
    ) -> None:
        self._staged(self._host.reduce_scatter, output, input, input_splits=input_splits)

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, *, output_splits: Sequence[int], async_op: bool = False
    ) -> None:
        self._staged(self._host.all_gather, output, input, output_splits=output_splits)

    def _staged(self, call: Callable[..., object], output: torch.Tensor, input: torch.Tensor, **splits: object) -> None:
        staged = output.cpu()
        call(staged, input.cpu(), **splits)
        output.copy_(staged)


def needs_gpus(num: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < num, reason=f"fewer than {num} GPUs")


@contextlib.contextmanager
def nccl_of(host: Communicator, path: str) -> Iterator[Communicator]:
    """A communicator on NCCL of the ranks of ``host``, with a GPU each. ``path``: of a file for their store."""
    torch.cuda.set_device(host.rank)
    store = file_store(path, host.world_size)
    with pycomm.init("nccl", store=store, rank=host.rank, world_size=host.world_size) as comm:
        yield comm
