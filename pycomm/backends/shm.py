"""The host transport: ranks are processes of one host that share memory. No GPU, no files, no ports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pycomm import _C
from pycomm.backends import Message
from pycomm.rendezvous import Rendezvous

__all__ = ["ShmBackend"]


class _Codes(dict[Any, int]):
    """The numbers of csrc/include/pycomm/types.hpp; a key that is not there is an error that names those that are."""

    def __init__(self, what: str, codes: dict[Any, int]) -> None:
        super().__init__(codes)
        self._what = what

    def __missing__(self, key: Any) -> int:
        name, *names = (str(code).removeprefix("torch.") for code in (key, *self))
        raise ValueError(f"{self._what} {name} is not supported; it is one of {', '.join(names)}")


_DTYPES = _Codes(
    "dtype",
    {
        torch.float32: 0,
        torch.float64: 1,
        torch.float16: 2,
        torch.bfloat16: 3,
        torch.int8: 4,
        torch.uint8: 5,
        torch.int32: 6,
        torch.int64: 7,
    },
)
# For calls that only move elements: those of bool are bytes.
_MOVED_DTYPES = _Codes("dtype", {**_DTYPES, torch.bool: 5})
_OPS = _Codes("op", {"sum": 0, "avg": 1, "min": 2, "max": 3, "prod": 4})


class ShmBackend:
    """One rank's end of the host transport; see :class:`pycomm.backends.Backend`."""

    name = "shm"
    device = torch.device("cpu")

    def __init__(self, core: _C.HostCommunicator) -> None:
        self._core = core
        self.rank = core.rank
        self.world_size = core.world_size
        self.group = core.name

    @classmethod
    def connect(cls, rendezvous: Rendezvous, name: str, strict: bool) -> ShmBackend:
        """Meet the other ranks of this host: rank 0 publishes a random socket address, the others come there."""
        listener, address = None, ""
        if rendezvous.world_size > 1 and rendezvous.rank == 0:
            listener = _C.Listener()
            rendezvous.put("shm/address", listener.address)
        elif rendezvous.world_size > 1:
            address = rendezvous.get("shm/address", rank=0)
        return cls(
            _C.HostCommunicator(
                name, rendezvous.rank, rendezvous.world_size, listener, address, rendezvous.timeout_s, strict
            )
        )

    def all_reduce(self, tensor: torch.Tensor, op: str, async_op: bool, timeout_s: float) -> _C.Work | None:
        return self._core.all_reduce(
            tensor.data_ptr(), tensor.numel(), _DTYPES[tensor.dtype], _OPS[op], async_op, timeout_s
        )

    def broadcast(self, tensor: torch.Tensor, root: int, async_op: bool, timeout_s: float) -> _C.Work | None:
        return self._core.broadcast(
            tensor.data_ptr(), tensor.numel(), _MOVED_DTYPES[tensor.dtype], root, async_op, timeout_s
        )

    def reduce(self, tensor: torch.Tensor, root: int, op: str, async_op: bool, timeout_s: float) -> _C.Work | None:
        return self._core.reduce(
            tensor.data_ptr(), tensor.numel(), _DTYPES[tensor.dtype], _OPS[op], root, async_op, timeout_s
        )

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        counts: Sequence[int],
        op: str,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        return self._core.reduce_scatter(
            output.data_ptr(), input.data_ptr(), _DTYPES[input.dtype], counts, _OPS[op], async_op, timeout_s
        )

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None:
        return self._core.all_gather(
            output.data_ptr(), input.data_ptr(), _MOVED_DTYPES[input.dtype], counts, async_op, timeout_s
        )

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None:
        return self._core.all_to_all(
            output.data_ptr(), input.data_ptr(), _MOVED_DTYPES[input.dtype], counts, async_op, timeout_s
        )

    def all_to_all_by_splits(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_counts: Sequence[int],
        input_counts: Sequence[int],
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        return self._core.all_to_all_by_splits(
            output.data_ptr(),
            input.data_ptr(),
            _MOVED_DTYPES[input.dtype],
            output_counts,
            input_counts,
            async_op,
            timeout_s,
        )

    def gather(
        self,
        output: torch.Tensor | None,
        input: torch.Tensor,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        return self._core.gather(
            _address(output), input.data_ptr(), _MOVED_DTYPES[input.dtype], counts, root, async_op, timeout_s
        )

    def scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor | None,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        return self._core.scatter(
            output.data_ptr(), _address(input), _MOVED_DTYPES[output.dtype], counts, root, async_op, timeout_s
        )

    def send(self, tensor: torch.Tensor, dst: int, tag: int, async_op: bool, timeout_s: float) -> _C.Work | None:
        return self._core.send(
            tensor.data_ptr(), tensor.numel(), _MOVED_DTYPES[tensor.dtype], dst, tag, async_op, timeout_s
        )

    def recv(self, tensor: torch.Tensor, src: int, tag: int, async_op: bool, timeout_s: float) -> _C.Work | int:
        return self._core.recv(
            tensor.data_ptr(), tensor.numel(), _MOVED_DTYPES[tensor.dtype], src, tag, async_op, timeout_s
        )

    def exchange(self, messages: Sequence[Message], async_op: bool, timeout_s: float) -> _C.Work | list[int]:
        specs = [
            (m.is_send, m.tensor.data_ptr(), m.tensor.numel(), _MOVED_DTYPES[m.tensor.dtype], m.peer, m.tag)
            for m in messages
        ]
        return self._core.exchange_messages(specs, async_op, timeout_s)

    def barrier(self, async_op: bool, timeout_s: float) -> _C.Work | None:
        return self._core.barrier(async_op, timeout_s)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, timeout_s: float) -> torch.Tensor:
        num_elements = 1
        for size in shape:
            num_elements *= size
        buffer = self._core.empty(num_elements * dtype.itemsize, timeout_s)
        return _view(buffer, num_elements, dtype).view(*shape)

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        num_bytes = tensor.numel() * tensor.element_size()
        return [
            _view(self._core.peer(tensor.data_ptr(), num_bytes, rank), tensor.numel(), tensor.dtype).view_as(tensor)
            for rank in range(self.world_size)
        ]

    def post(self, flag: torch.Tensor, value: int) -> None:
        self._core.post(flag.data_ptr(), value)

    def wait_posted(self, flag: torch.Tensor, value: int, timeout_s: float) -> None:
        self._core.wait_posted(flag.data_ptr(), value, timeout_s)

    def split(self, color: int | None, key: int, timeout_s: float) -> ShmBackend | None:
        core = self._core.split(color, key, timeout_s)
        return None if core is None else ShmBackend(core)

    def abort(self, reason: str) -> None:
        self._core.abort(reason)

    def close(self, drain_s: float) -> None:
        self._core.close(drain_s)


def _view(buffer: _C.SymmetricBuffer, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """The buffer's memory as a flat tensor that keeps the buffer alive."""
    if num_elements == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=num_elements)


def _address(tensor: torch.Tensor | None) -> int:
    """0: this rank has no such tensor."""
    return 0 if tensor is None else tensor.data_ptr()
