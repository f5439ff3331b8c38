"""The host transport: ranks are processes of one host that share memory. No GPU, no files, no ports."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pycomm import _C
from pycomm.backends import Message
from pycomm.rendezvous import Rendezvous

__all__ = ["ShmBackend"]

# The codes of csrc/include/pycomm/types.hpp.
_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int32: 6,
    torch.int64: 7,
}
_OPS = {"sum": 0, "avg": 1, "min": 2, "max": 3, "prod": 4}


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
            tensor.data_ptr(), tensor.numel(), _dtype_code(tensor), _op_code(op), async_op, timeout_s
        )

    def broadcast(self, tensor: torch.Tensor, root: int, async_op: bool, timeout_s: float) -> _C.Work | None:
        return self._core.broadcast(tensor.data_ptr(), tensor.numel(), _moved_code(tensor), root, async_op, timeout_s)

    def reduce(self, tensor: torch.Tensor, root: int, op: str, async_op: bool, timeout_s: float) -> _C.Work | None:
        return self._core.reduce(
            tensor.data_ptr(), tensor.numel(), _dtype_code(tensor), _op_code(op), root, async_op, timeout_s
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
            output.data_ptr(), input.data_ptr(), _dtype_code(input), counts, _op_code(op), async_op, timeout_s
        )

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None:
        return self._core.all_gather(
            output.data_ptr(), input.data_ptr(), _moved_code(input), counts, async_op, timeout_s
        )

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None:
        return self._core.all_to_all(
            output.data_ptr(), input.data_ptr(), _moved_code(input), counts, async_op, timeout_s
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
            output.data_ptr(), input.data_ptr(), _moved_code(input), output_counts, input_counts, async_op, timeout_s
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
            _address(output), input.data_ptr(), _moved_code(input), counts, root, async_op, timeout_s
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
            output.data_ptr(), _address(input), _moved_code(output), counts, root, async_op, timeout_s
        )

    def exchange(self, messages: Sequence[Message], async_op: bool, timeout_s: float) -> _C.Work | list[int]:
        specs = [
            (m.is_send, m.tensor.data_ptr(), m.tensor.numel(), _moved_code(m.tensor), m.peer, m.tag) for m in messages
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


def _dtype_code(tensor: torch.Tensor) -> int:
    code = _DTYPES.get(tensor.dtype)
    if code is None:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"dtype {tensor.dtype} is not supported; it is one of {names}: convert or view the tensor")
    return code


def _moved_code(tensor: torch.Tensor) -> int:
    """For calls that only move elements: those of bool are bytes."""
    return _DTYPES[torch.uint8] if tensor.dtype == torch.bool else _dtype_code(tensor)


def _address(tensor: torch.Tensor | None) -> int:
    """0: this rank has no such tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def _op_code(op: str) -> int:
    code = _OPS.get(op)
    if code is None:
        raise ValueError(f"op={op!r}: it is one of {', '.join(_OPS)}")
    return code
