"""The checks of arguments for back ends that are written in Python. The extension has their logic, and checks its own.

:class:`Checked` stands between a Communicator and such a back end, which it hands checked tensors and counts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import UnionType
from typing import Any, Protocol

import torch

from pycomm import _C

__all__ = [
    "MOVED",
    "REDUCED",
    "Checked",
    "CheckedCalls",
    "Message",
    "checked_int",
    "checked_shape",
    "checked_timeout",
    "checked_type",
    "dtype_name",
    "tensor_on",
]

# The dtypes that calls move, and those that have arithmetic of their own. Reductions also take bool, by "or" (sum, max)
# and "and" (prod, min), and complex numbers, as pairs (sum, avg).
MOVED: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in _C.DTYPES if hasattr(torch, name))
REDUCED = MOVED[: _C.NUM_NUMBER_TYPES]
_MOST_BYTES = 2**63 - 1
_LEAST_TAG = -(2**63)  # taken, by steps of collectives

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
        tensor = self._written(tensor, "the tensor")
        return self._backend.all_reduce(tensor, _C.checked_op(tensor, op), *self._options(async_op, timeout_s))

    def broadcast(self, tensor: Any, root: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        tensor = self._written(tensor, "the tensor")
        return self._backend.broadcast(tensor, self._rank(root, "root"), *self._options(async_op, timeout_s))

    def reduce(self, tensor: Any, root: int, op: str, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        root = self._rank(root, "root")
        tensor = (self._written if root == self._backend.rank else self._read)(tensor, "the tensor")
        return self._backend.reduce(tensor, root, _C.checked_op(tensor, op), *self._options(async_op, timeout_s))

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
        output, input = self._written(output, "output"), self._read(input, "input")
        counts = _C.part_counts(input, "input", input_splits, self._backend.world_size)
        _C.check_part(output, input, True, counts, self._backend.rank)
        op = _C.checked_op(input, op)
        return self._backend.reduce_scatter(output, input, counts, op, *self._options(async_op, timeout_s))

    def all_gather(
        self,
        output: Any,
        input: Any,
        output_splits: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        /,
    ) -> _C.Work | None:
        output, input = self._written(output, "output"), self._read(input, "input")
        counts = _C.part_counts(output, "output", output_splits, self._backend.world_size)
        _C.check_part(output, input, False, counts, self._backend.rank)
        return self._backend.all_gather(output, input, counts, *self._options(async_op, timeout_s))

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
        output, input = self._written(output, "output"), self._read(input, "input")
        _C.check_apart(output, input)
        input_counts = _C.part_counts(input, "input", input_splits, self._backend.world_size)
        options = self._options(async_op, timeout_s)
        if output_splits is None and input_splits is None:
            _C.check_count(output, "output", input.numel())
            return self._backend.all_to_all(output, input, input_counts, *options)
        output_counts = _C.part_counts(output, "output", output_splits, self._backend.world_size)
        return self._backend.all_to_all_by_splits(output, input, output_counts, input_counts, *options)

    def gather(self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        input = self._read(input, "input")
        root = self._rank(root, "root")
        _C.check_only_at_root(output, root, self._backend.rank, "output")
        counts = [input.numel()] * self._backend.world_size
        if output is not None:
            output = self._written(output, "output")
            _C.check_count(output, "output", sum(counts))
            _C.check_part(output, input, False, counts, root)
        return self._backend.gather(output, input, counts, root, *self._options(async_op, timeout_s))

    def scatter(self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        output = self._written(output, "output")
        root = self._rank(root, "root")
        _C.check_only_at_root(input, root, self._backend.rank, "input")
        counts = [output.numel()] * self._backend.world_size
        if input is not None:
            input = self._read(input, "input")
            _C.check_count(input, "input", sum(counts))
            _C.check_part(output, input, True, counts, root)
        return self._backend.scatter(output, input, counts, root, *self._options(async_op, timeout_s))

    def barrier(self, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        return self._backend.barrier(*self._options(async_op, timeout_s))

    def send(self, tensor: Any, dst: int, tag: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | None:
        _, tensor, _, tag = self._message((True, tensor, dst, tag))
        return self._backend.send(tensor, self._rank(dst, "dst"), tag, *self._options(async_op, timeout_s))

    def recv(self, tensor: Any, src: int | None, tag: int, async_op: bool, timeout_s: float | None, /) -> _C.Work | int:
        _, tensor, src, tag = self._message((False, tensor, src, tag))
        return self._backend.recv(tensor, src, tag, *self._options(async_op, timeout_s))

    def exchange(self, messages: Sequence[Message], async_op: bool, timeout_s: float | None, /) -> _C.Work | list[int]:
        checked = [self._message(message) for message in messages]
        return self._backend.exchange(checked, *self._options(async_op, timeout_s))

    def _message(self, message: Message) -> Message:
        is_send, tensor, peer, tag = message
        tensor = (self._read if is_send else self._written)(tensor, "the tensor")
        world_size = self._backend.world_size
        peer = _C.checked_rank(peer, world_size, "dst") if is_send else _C.checked_source(peer, world_size)
        if _C.checked_tag(tag) == _LEAST_TAG:
            raise ValueError(f"tag={tag}: it is an integer of 64 bits, and -2**63 is taken")
        return is_send, tensor, peer, operator.index(tag)

    def _read(self, tensor: Any, name: str) -> torch.Tensor:
        return tensor_on(self._backend.device, tensor, name)

    def _written(self, tensor: Any, name: str) -> torch.Tensor:
        return _C.checked_tensor(tensor, name, _cuda_index(self._backend.device), True)

    def _rank(self, rank: int, name: str) -> int:
        return _C.checked_rank(rank, self._backend.world_size, name)

    def _options(self, async_op: bool, timeout_s: float | None) -> tuple[bool, float]:
        seconds = self._timeout_s if timeout_s is None else checked_timeout(timeout_s)
        return _C.checked_flag(async_op, "async_op"), seconds


def tensor_on(device: torch.device, tensor: Any, name: str = "the tensor") -> torch.Tensor:
    """A contiguous torch tensor on ``device`` that shares memory with ``tensor``, which may be any DLPack array.

    Raises:
        TypeError: neither a tensor nor an array that speaks DLPack.
        ValueError: not contiguous, elsewhere, or of a dtype that no call takes.
    """
    return _C.checked_tensor(tensor, name, _cuda_index(device), False)


def checked_timeout(timeout_s: float) -> float:
    """``timeout_s`` as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive, or longer than 1e9 seconds, inf among them: every wait is bounded.
    """
    return _C.checked_timeout(timeout_s)


def checked_int(value: Any, name: str, *, or_none: bool = False) -> int:
    """``value`` as an int of 64 bits.

    Args:
        or_none: the text of an error says that None may be given, too.

    Raises:
        TypeError, ValueError: it is none; says what to write.
    """
    try:
        number = operator.index(value)
    except TypeError:
        expected = "an int, or None" if or_none else "an int"
        raise TypeError(f"{name} is {value!r}: it is {expected}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} is {number}: it is an int of 64 bits")
    return number


def checked_type(value: Any, kind: type | UnionType, name: str, expected: str) -> None:
    """TypeError unless ``value`` is a ``kind``, which the error calls ``expected``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}: it is {expected}")


def checked_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """``shape`` of new memory of ``dtype``.

    Raises:
        TypeError: a size is no int, or ``dtype`` is none of torch.
        ValueError: a size is negative, the whole has more bytes than an address space, or no call moves ``dtype``.
    """
    checked_type(dtype, torch.dtype, "dtype", "one of torch's, such as torch.float32")
    if dtype not in MOVED:
        names = ", ".join(_C.DTYPES)
        raise ValueError(f"empty: dtype {dtype_name(dtype)} is not supported; it is one of {names}")
    num_bytes = dtype.itemsize
    sizes = []
    for size in shape:
        try:
            sizes.append(operator.index(size))
        except TypeError:
            raise TypeError(f"empty: size {size!r} is no int; sizes are given one by one, as in empty(2, 3)") from None
        num_bytes *= sizes[-1]
    if any(size < 0 for size in sizes):
        raise ValueError(f"empty: negative size in {tuple(sizes)}")
    if num_bytes > _MOST_BYTES:
        raise ValueError(f"empty: {tuple(sizes)} of {dtype_name(dtype)} are {num_bytes} bytes, more than 2**63 - 1")
    return tuple(sizes)


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _cuda_index(device: torch.device) -> int:
    """-1: the host."""
    return -1 if device.type == "cpu" else device.index or 0
