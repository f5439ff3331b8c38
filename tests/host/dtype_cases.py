"""Two ranks that call the same with different dtypes of equally many bytes: nothing but the dtype tells them apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pycomm import Communicator
from pycomm.errors import MismatchError

MOVED = (
    *(torch.uint8, torch.bool, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.complex32),
    *(torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64, torch.float64, torch.complex64),
    *(torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
)
PAIRS = tuple(itertools.combinations(MOVED, 2))
REDUCED = (
    *(torch.uint8, torch.bool, torch.int8, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
)
_BYTES = 32  # of a rank's part: two of the largest elements
_FILL = 0b01000001  # a byte that means a number in every dtype

Pairs = Sequence[tuple[torch.dtype, torch.dtype]]


def tensor_of(dtype: torch.dtype, num_parts: int) -> torch.Tensor:
    """Every byte _FILL, but for bool, whose bytes are 1."""
    fill = 1 if dtype is torch.bool else _FILL
    return torch.full((num_parts * _BYTES,), fill, dtype=torch.uint8).view(dtype)


def calls(comm: Communicator, whole: torch.Tensor, part: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Everything that two ranks call, by the text that describes it."""
    dtype, n, one = str(whole.dtype).removeprefix("torch."), whole.numel(), part.numel()
    other, is_root = 1 - comm.rank, comm.rank == 0
    found: dict[str, Callable[[], Any]] = {
        f"broadcast(root=0, {dtype}[{n}])": lambda: comm.broadcast(whole),
        f"all_gather({dtype}[{n}])": lambda: comm.all_gather(whole, part),
        f"all_to_all({dtype}[{n}])": lambda: comm.all_to_all(whole, whole.clone()),
        f"all_to_all({dtype} by splits)": lambda: comm.all_to_all(whole, whole.clone(), [one] * 2, [one] * 2),
        f"gather(root=0, {dtype}[{n}] in all)": lambda: comm.gather(whole if is_root else None, part),
        f"scatter(root=0, {dtype}[{n}] in all)": lambda: comm.scatter(part, whole if is_root else None),
    }
    if comm.rank == 0:
        found[f"send(dst={other}, tag=3, {dtype}[{n}])"] = lambda: comm.send(whole, other, 3)
    else:
        found[f"recv(src={other}, tag=3, {dtype}[{n}])"] = lambda: comm.recv(whole, other, 3)
    if whole.dtype in REDUCED:
        found |= {
            f"all_reduce(sum, {dtype}[{n}])": lambda: comm.all_reduce(whole),
            f"scan(sum, {dtype}[{n}])": lambda: comm.scan(whole),
            f"reduce(root=0, sum, {dtype}[{n}])": lambda: comm.reduce(whole),
            f"reduce_scatter(sum, {dtype}[{n}])": lambda: comm.reduce_scatter(part, whole),
        }
    return found


def mismatched_pairs(comm: Communicator, _: Any = None, pairs: Pairs = PAIRS) -> None:
    """Rank 0 calls with the first dtype of each pair, rank 1 with the second."""
    for pair in pairs:
        dtype = pair[comm.rank]
        whole, part = tensor_of(dtype, 2), tensor_of(dtype, 1)
        mine = calls(comm, whole, part)
        if not all(each in REDUCED for each in pair):
            mine = {text: call for text, call in mine.items() if "sum" not in text}
        for text, call in mine.items():
            with pytest.raises(MismatchError) as raised:
                call()
            assert raised.value.calls[comm.rank] == text
            assert (
                str(pair[1 - comm.rank]).removeprefix("torch.") + ("[" if "splits" not in text else " by")
                in (raised.value.calls[1 - comm.rank])
            )
            for tensor in (whole, part):  # nothing was written
                assert torch.equal(
                    tensor.view(torch.uint8), tensor_of(dtype, tensor.nbytes // _BYTES).view(torch.uint8)
                )
