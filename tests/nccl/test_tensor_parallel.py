"""Products on NCCL: by collectives, and overlapped ones, whose place sums over the host take here.

What is tested is all that lies around ``OverlappedMatmuls``: layouts, what ranks agree on, workspaces, the backward
halves, results. Itself it runs in tests/cuda_on_cpu, and on a GPU in tests/gpu.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from pycomm import Communicator
from pycomm.errors import BackendUnavailableError, PycommError
from pycomm.tensor_parallel.products import (
    all_gather_matmul,
    copy_matmul,
    matmul_all_reduce,
    matmul_reduce_scatter,
    products_of,
)
from pycomm.tensor_parallel.products.cuda import CudaProducts
from tests.nccl.helpers import read_by_the_host, run
from tests.pool import Pool
from tests.tensor_parallel import test_products

Rows = Sequence[int]
RAGGED = [[1, 1, 1], [0, 9, 2], [300, 1, 0], [0, 2000, 0]]


class HostRanks:
    """In the place of KernelRanks: the host's communicator, by which :class:`HostSums` move what they need."""

    def __init__(self, host: Communicator) -> None:
        self.host = host
        self.device = torch.device("cpu")

    @classmethod
    def processes(cls, host: Communicator, *, device: int | None) -> HostRanks:
        return cls(host)


class HostSums:
    """In the place of OverlappedMatmuls: the same methods, over a copy of what a workspace would hold."""

    made: list[HostSums] = []  # noqa: RUF012  (cleared by who uses it)

    def __init__(self, ranks: HostRanks, rows: Rows, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        self.host = ranks.host
        self.capacity = (sum(rows), max(rows), in_features, out_features)
        self.dtype = dtype
        self.calls: list[tuple[str, bool]] = []
        self.num_synchronized = 0
        self.made.append(self)

    def all_gather_matmul(self, xs: Any, weights: Any, rows: Rows, **options: Any) -> None:
        x, weight_t, out = self.checked("all_gather_matmul", xs, weights, rows, **options)
        whole = x.new_empty(sum(rows), x.shape[1])
        self.host.all_gather(whole, x, output_splits=list(rows))
        out.copy_(whole @ weight_t)
        start = sum(rows[: self.host.rank])
        whole[start : start + rows[self.host.rank]] = torch.nan
        self.whole = whole

    def matmul_reduce_scatter(self, xs: Any, weights: Any, rows: Rows, **options: Any) -> None:
        x, weight_t, out = self.checked("matmul_reduce_scatter", xs, weights, rows, **options)
        self.host.reduce_scatter(out, x @ weight_t, input_splits=list(rows))

    def matmul_all_reduce(self, xs: Any, weights: Any, rows: Rows, **options: Any) -> None:
        x, weight_t, out = self.checked("matmul_all_reduce", xs, weights, rows, **options)
        out.copy_(x @ weight_t)
        self.host.all_reduce(out)

    def gathered(self, rows: Rows, in_features: int) -> Tensor:
        assert self.whole.shape == (sum(rows), in_features)
        return self.whole

    def synchronize(self, timeout_s: float) -> None:
        self.num_synchronized += 1

    def checked(
        self, call: str, xs: Any, weights: Any, rows: Rows, transposed: bool, one_by_one: bool, outs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        (x,), (weight,), (out,) = xs, weights, outs
        own, scatters = rows[self.host.rank], call == "matmul_reduce_scatter"
        weight_t = weight if transposed else weight.t()
        assert x.shape == ((own if call == "all_gather_matmul" else sum(rows)), weight_t.shape[0])
        assert out.shape == ((own if scatters else sum(rows)), weight_t.shape[1])
        for tensor in (x, weight, out):
            assert tensor.is_contiguous()
            assert tensor.dtype == self.dtype
        sizes = (sum(rows), max(rows), *weight_t.shape)
        assert min(weight_t.shape) > 0
        assert all(size <= most for size, most in zip(sizes, self.capacity, strict=True))
        self.calls.append((call, one_by_one))
        return x, weight_t, out


class OneStream:
    """In the place of SideStream."""

    def __init__(self, device: torch.device) -> None:
        pass

    @contextlib.contextmanager
    def behind_current(self) -> Iterator[None]:
        yield

    def rejoin(self) -> None:
        pass


@contextlib.contextmanager
def mapped() -> Iterator[list[HostSums]]:
    HostSums.made.clear()
    module = "pycomm.tensor_parallel.products.cuda"
    with (
        patch(f"{module}.kernel_device", lambda index: 0),
        patch(f"{module}.KernelRanks", HostRanks),
        patch(f"{module}.OverlappedMatmuls", HostSums),
        patch(f"{module}.SideStream", OneStream),
        read_by_the_host(),
    ):
        yield HostSums.made


def cases(comm: Communicator) -> set[tuple[str, bool]]:
    with mapped() as made:
        for name in ("check_all_gather", "check_reduce", "check_copy"):
            assert test_products.every_case(comm, name)
        assert test_products.ragged(comm, [rows[: comm.world_size] for rows in RAGGED])
        return {call for workspace in made for call in workspace.calls}


@pytest.mark.parametrize("size", [2, 3])
def test_results_and_gradients_are_those_of_the_whole(pool: Pool, standin: Path, tmp_path: Path, size: int) -> None:
    operators = (all_gather_matmul, matmul_reduce_scatter, matmul_all_reduce)
    used = {(operator.__name__, one_by_one) for operator in operators for one_by_one in (True, False)}
    assert run(pool, size, standin, tmp_path, cases) == [used] * size


class Unmapped(HostRanks):
    """On rank 1."""

    @classmethod
    def processes(cls, host: Communicator, *, device: int | None) -> HostRanks:
        if host.rank == 1:
            raise BackendUnavailableError("no way between these GPUs")
        return cls(host)


def by_collectives(comm: Communicator) -> None:
    """Where memory cannot be mapped on one rank, all ranks go by collectives."""
    with mapped() as made, patch("pycomm.tensor_parallel.products.cuda.KernelRanks", Unmapped):
        assert not isinstance(products_of(comm), CudaProducts)
        for name in ("check_all_gather", "check_reduce", "check_copy"):
            assert test_products.every_case(comm, name)
        assert not made


def one_build_without_kernels(comm: Communicator) -> None:
    """Nobody begins to map, which would wait for the rank that cannot."""

    def device(index: int | None) -> int:
        if comm.rank == 1:
            raise BackendUnavailableError("this build of pycomm has no CUDA code")
        return 0

    module = "pycomm.tensor_parallel.products.cuda"
    with mapped(), patch(f"{module}.kernel_device", device), patch(f"{module}.KernelRanks", None):
        assert not isinstance(products_of(comm), CudaProducts)


@pytest.mark.parametrize("body", [by_collectives, one_build_without_kernels])
def test_by_collectives(pool: Pool, standin: Path, tmp_path: Path, body: Callable[[Communicator], None]) -> None:
    run(pool, 2, standin, tmp_path, body)


def bits(comm: Communicator, overlap: bool, ranks: type[HostRanks]) -> list[bytes]:
    with mapped(), patch("pycomm.tensor_parallel.products.cuda.KernelRanks", ranks):
        found: list[bytes] = test_products.bits_of(comm, overlap)
        return found


@pytest.mark.parametrize("ranks", [HostRanks, Unmapped])
def test_overlap_does_not_change_a_bit(pool: Pool, standin: Path, tmp_path: Path, ranks: type[HostRanks]) -> None:
    (again := tmp_path / "again").mkdir()
    assert run(pool, 3, standin, tmp_path, bits, True, ranks) == run(pool, 3, standin, again, bits, False, ranks)


def different_calls(comm: Communicator, check: Callable[..., Any], *args: Any) -> Any:
    with mapped():
        return check(comm, *args)


def test_different_calls_are_named(pool: Pool, standin: Path, tmp_path: Path) -> None:
    for index, (check, args) in enumerate(
        [
            *((test_products.mismatch, (name,)) for name in ("all_gather_matmul", "matmul_all_reduce")),
            (test_products.different_operators, ()),
        ]
    ):
        (folder := tmp_path / str(index)).mkdir()
        assert run(pool, 2, standin, folder, different_calls, check, *args) == pool.run(2, check, *args)


def workspaces(comm: Communicator) -> None:
    """One a dtype, which grows with what ranks bring, on all of them at once; a failed group ends what waits in it."""
    with mapped() as made:
        for rows, dtype in ((4, torch.float32), (2, torch.float32), (3, torch.bfloat16), (9, torch.float32)):
            x, weight = torch.ones(rows + comm.rank, 3, dtype=dtype), torch.ones(2 + comm.rank, 3, dtype=dtype)
            assert (all_gather_matmul(x, weight, comm) == 3).all()
        assert [(workspace.dtype, workspace.capacity) for workspace in made] == [
            (torch.float32, (9, 5, 3, 3)),
            (torch.bfloat16, (7, 4, 3, 3)),
            (torch.float32, (19, 10, 3, 3)),
        ]
        assert [workspace.num_synchronized for workspace in made] == [1, 0, 0]
        with torch.device("meta"):  # wherever new tensors go by default
            all_gather_matmul(x, weight, comm)
        bias = torch.full((3,), 2.0)
        assert (matmul_reduce_scatter(torch.ones(4, 2, 3), torch.ones(3, 3), comm, bias) == 8).all()
        assert (matmul_all_reduce(torch.ones(2, 3), torch.ones(3, 3), comm, bias) == 8).all()
        assert (copy_matmul(torch.ones(2, 3), torch.ones(3, 3), comm, bias) == 5).all()
        with pytest.raises(ValueError, match=r"rows, expected \[1, 1\]"):
            all_gather_matmul(torch.ones(2, 3), torch.ones(2, 3), comm, sizes=[1, 1])
        apart = comm.split(0)
        assert apart is not None
        all_gather_matmul(torch.ones(2, 3), torch.ones(2, 3), apart)
        (of_apart,) = made[3:]
        apart.barrier()
        if apart.rank == 0:
            apart.abort("enough")
        with pytest.raises(PycommError, match="enough"):
            while True:
                apart.synchronize()
        assert of_apart.num_synchronized == 1
        assert made[2].num_synchronized == 0


def test_workspaces(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 2, standin, tmp_path, workspaces)
