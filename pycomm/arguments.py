"""The checks of arguments for back ends that are written in Python. The extension has their logic, and checks its own.

:class:`Checked` stands between a Communicator and such a back end, which it hands checked tensors and counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pycomm import _C

__all__ = ["MOVED", "REDUCED", "Checked", "CheckedCalls", "Message", "checked_timeout", "tensor_on"]

# The dtypes that calls take: those that they reduce, and those that they move.
REDUCED = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)
MOVED = (*REDUCED, torch.bool)

# (is_send, tensor, peer, tag); peer None: any source.
Message = tuple[bool, Any, int | None, int]


class CheckedCalls(Protocol):
    """The calls of a back end in Python.

    Tensors are contiguous, on ``device`` and of supported dtypes. Counts are elements of each rank's part: of the input
    of reduce_scatter, of the output of all_gather, of the root's tensor in gather and scatter, where the other ranks
    have None. Calls return a Work when ``async_op``, else None.
    """

    device: torch.device
    rank: int
    world_size: int

    def all_reduce(self, tensor: torch.Tensor, op: str, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def broadcast(self, tensor: torch.Tensor, root: int, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def reduce(self, tensor: torch.Tensor, root: int, op: str, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        counts: Sequence[int],
        op: str,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None: ...
    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None: ...
    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None: ...
    def all_to_all_by_splits(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_counts: Sequence[int],
        input_counts: Sequence[int],
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None: ...
    def gather(
        self,
        output: torch.Tensor | None,
        input: torch.Tensor,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None: ...
    def scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor | None,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None: ...
    def barrier(self, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def send(self, tensor: torch.Tensor, dst: int, tag: int, async_op: bool, timeout_s: float) -> _C.Work | None: ...
    def recv(
        self, tensor: torch.Tensor, src: int | None, tag: int, async_op: bool, timeout_s: float
    ) -> _C.Work | int: ...
    def exchange(self, messages: Sequence[Message], async_op: bool, timeout_s: float) -> _C.Work | list[int]: ...


class Checked:
    """The :class:`pycomm.backends.Calls` of a back end in Python: checks, then calls it."""

    def __init__(self, backend: CheckedCalls, timeout_s: float) -> None:
        self._backend = backend
        self._timeout_s = timeout_s

    def all_reduce(self, tensor: Any, op: str, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        tensor = self._reduced(tensor, "the tensor")
        return self._backend.all_reduce(tensor, _C.checked_op(op), async_op, self._timeout(timeout_s))

    def broadcast(self, tensor: Any, root: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        tensor = self._moved(tensor, "the tensor")
        return self._backend.broadcast(tensor, self._rank(root, "root"), async_op, self._timeout(timeout_s))

    def reduce(self, tensor: Any, root: int, op: str, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        tensor = self._reduced(tensor, "the tensor")
        root = self._rank(root, "root")
        return self._backend.reduce(tensor, root, _C.checked_op(op), async_op, self._timeout(timeout_s))

    def reduce_scatter(
        self,
        output: Any,
        input: Any,
        op: str,
        input_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> _C.Work | None:
        output, input = self._reduced(output, "output"), self._reduced(input, "input")
        counts = _C.part_counts(input, "input", input_splits, self._backend.world_size)
        _C.check_part(output, input, True, counts, self._backend.rank)
        op = _C.checked_op(op)
        return self._backend.reduce_scatter(output, input, counts, op, async_op, self._timeout(timeout_s))

    def all_gather(
        self,
        output: Any,
        input: Any,
        output_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> _C.Work | None:
        output, input = self._moved(output, "output"), self._moved(input, "input")
        counts = _C.part_counts(output, "output", output_splits, self._backend.world_size)
        _C.check_part(output, input, False, counts, self._backend.rank)
        return self._backend.all_gather(output, input, counts, async_op, self._timeout(timeout_s))

    def all_to_all(
        self,
        output: Any,
        input: Any,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> _C.Work | None:
        output, input = self._moved(output, "output"), self._moved(input, "input")
        _C.check_apart(output, input)
        input_counts = _C.part_counts(input, "input", input_splits, self._backend.world_size)
        timeout_s = self._timeout(timeout_s)
        if output_splits is None and input_splits is None:
            _C.check_count(output, "output", input.numel())
            return self._backend.all_to_all(output, input, input_counts, async_op, timeout_s)
        output_counts = _C.part_counts(output, "output", output_splits, self._backend.world_size)
        return self._backend.all_to_all_by_splits(output, input, output_counts, input_counts, async_op, timeout_s)

    def gather(self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        input = self._moved(input, "input")
        output = self._only_at_root(output, root, "output")
        counts = [input.numel()] * self._backend.world_size
        if output is not None:
            _C.check_count(output, "output", sum(counts))
            _C.check_part(output, input, False, counts, root)
        return self._backend.gather(output, input, counts, root, async_op, self._timeout(timeout_s))

    def scatter(self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        output = self._moved(output, "output")
        input = self._only_at_root(input, root, "input")
        counts = [output.numel()] * self._backend.world_size
        if input is not None:
            _C.check_count(input, "input", sum(counts))
            _C.check_part(output, input, True, counts, root)
        return self._backend.scatter(output, input, counts, root, async_op, self._timeout(timeout_s))

    def barrier(self, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        return self._backend.barrier(async_op, self._timeout(timeout_s))

    def send(self, tensor: Any, dst: int, tag: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        tensor = self._moved(tensor, "the tensor")
        return self._backend.send(tensor, self._rank(dst, "dst"), tag, async_op, self._timeout(timeout_s))

    def recv(self, tensor: Any, src: int | None, tag: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | int:
        _, tensor, src, tag = self._message((False, tensor, src, tag))
        return self._backend.recv(tensor, src, tag, async_op, self._timeout(timeout_s))

    def exchange(self, messages: Sequence[Message], async_op: bool, timeout_s: float | None, /) -> _C.Work | list[int]:
        checked = [self._message(message) for message in messages]
        return self._backend.exchange(checked, async_op, self._timeout(timeout_s))

    def _message(self, message: Message) -> Message:
        is_send, tensor, peer, tag = message
        if peer is not None:
            peer = self._rank(peer, "dst" if is_send else "src")
        return is_send, self._moved(tensor, "the tensor"), peer, tag

    def _moved(self, tensor: Any, name: str) -> torch.Tensor:
        return tensor_on(self._backend.device, tensor, name)

    def _reduced(self, tensor: Any, name: str) -> torch.Tensor:
        return _C.checked_tensor(tensor, name, _cuda_index(self._backend.device), True)

    def _only_at_root(self, tensor: Any, root: int, name: str) -> torch.Tensor | None:
        _C.check_only_at_root(tensor, root, self._backend.rank, self._backend.world_size, name)
        return None if tensor is None else self._moved(tensor, name)

    def _rank(self, rank: int, name: str) -> int:
        _C.check_rank(rank, self._backend.world_size, name)
        return rank

    def _timeout(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else checked_timeout(timeout_s)


def tensor_on(device: torch.device, tensor: Any, name: str = "the tensor") -> torch.Tensor:
    """A contiguous torch tensor on ``device`` that shares memory with ``tensor``, which may be any DLPack array.

    Raises:
        TypeError: neither a tensor nor an array that speaks DLPack.
        ValueError: not contiguous, elsewhere, or of a dtype that no call takes.
    """
    return _C.checked_tensor(tensor, name, _cuda_index(device), False)


def checked_timeout(timeout_s: float) -> float:
    """``timeout_s``, or ValueError if it is no positive number of seconds."""
    if not timeout_s > 0:  # false for nan, too
        raise ValueError(f"timeout_s={timeout_s}: it is a positive number of seconds")
    return timeout_s


def _cuda_index(device: torch.device) -> int:
    """-1: the host."""
    return -1 if device.type == "cpu" else device.index or 0
