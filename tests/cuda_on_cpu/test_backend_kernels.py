"""The kernels as the NCCL back end launches them: its grids and its staging memory, on virtual ranks on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pycomm.backends.nccl import kernels as backend_kernels
from pycomm.backends.nccl.kernels import Kernels
from pycomm.gpu.grids import ONE_SHOT_CHUNK, Grid, one_shot_grid
from tests.cuda_on_cpu.kernels import DTYPES, OPS, Memory, Ranks, flat_layout, pointers
from tests.cuda_on_cpu.test_collectives import assert_same_bits, host_reduced
from tests.host.reduce_reference import STORAGE, some_sources

MakeRanks = Callable[..., Ranks]
PAD_BYTES = 5000  # of no importance here: these ranks have theirs elsewhere


class OneMemory:
    """What :class:`pycomm._C.GpuMemory` is: a part of each rank, between guard bytes."""

    def __init__(self, world_size: int, num_bytes: int) -> None:
        self.parts = [Memory(np.zeros(num_bytes, np.uint8)) for _ in range(world_size)]
        self.world_size, self.bytes = world_size, num_bytes

    def part(self, rank: int) -> int:
        return self.parts[rank].address


def group_class(ranks: Ranks) -> Any:
    """What :class:`pycomm._C.RankGroup` is, for the ranks of ``ranks``."""

    class Group:
        def __init__(self, memory: OneMemory, device: int, local_ranks: list[int], timeout_s: float) -> None:
            pass

        def abort_word(self, rank: int) -> int:
            return 0

        status = abort_word

        @staticmethod
        def staging_bytes(wire: str, count: int, chunk: int, grid: Grid) -> int:
            ranks.blocks, ranks.threads = grid
            return ranks.staging_bytes(flat_layout(count, chunk), wire)

        def all_reduce_one_shot(
            self, rank: int, dtype: str, wire: str, op: str, count: int, chunk: int, *rest: Any
        ) -> None:
            input, output, staging, num_bytes, grid, _ = rest
            ranks.blocks, ranks.threads = grid
            layout = flat_layout(count, chunk)
            addresses = (ctypes.c_void_p(input), ctypes.c_void_p(output), pointers(staging))
            codes = (DTYPES[dtype], DTYPES[wire], OPS[op])
            ranks.keep(layout)
            ranks.launch(
                "all_reduce_one_shot", rank, ctypes.byref(layout), *codes, *addresses, ctypes.c_size_t(num_bytes), None
            )

        def all_reduce_two_shot(self, rank: int, dtype: str, op: str, count: int, data: list[int], *rest: Any) -> None:
            _, (ranks.blocks, ranks.threads), _ = rest
            layout = flat_layout(count)
            codes = (DTYPES[dtype], OPS[op])
            ranks.keep(layout)
            ranks.launch("all_reduce_two_shot", rank, ctypes.byref(layout), *codes, pointers(data), None)

    return Group


@pytest.fixture
def on_cpu(make_ranks: MakeRanks, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Ranks]:
    """on_cpu(world): ranks that :class:`Kernels` launches on."""

    def make(world: int) -> Ranks:
        ranks = make_ranks(world)
        core = SimpleNamespace(RankGroup=group_class(ranks), SIGNAL_PAD_BYTES=PAD_BYTES)
        monkeypatch.setattr(backend_kernels, "_C", core)
        return ranks

    return make


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "uint8"])
def test_calls_follow_each_other(on_cpu: Callable[[int], Ranks], world: int, dtype: str) -> None:
    ranks = on_cpu(world)
    num_multiprocessors, size = 2, np.dtype(STORAGE[dtype]).itemsize
    most = 9000 // size
    memory = OneMemory(world, Kernels.memory_bytes(9000, num_multiprocessors))
    device = torch.device("cuda", 0)
    of_ranks = [Kernels(memory, device, rank, num_multiprocessors, 1.0) for rank in range(world)]  # type: ignore[arg-type]
    for seed, (count, one_shot) in enumerate([(most, True), (1, True), (5000, False), (300, True), (most, True)]):
        sources = some_sources(dtype, world, count, seed)
        tensors = [Memory(raw, seed % 2) for raw in sources]
        addresses = [tensor.address for tensor in tensors]
        for rank, kernels in enumerate(of_ranks):
            if one_shot:
                kernels.launch("one_shot", [addresses[rank]], count, dtype, "sum", 0)
            else:
                kernels.launch("two_shot", addresses, count, dtype, "sum", 0)
        ranks.run(seed)
        wanted = host_reduced(dtype, "sum", sources)
        for tensor in tensors:
            assert_same_bits(tensor.elements, wanted)
            tensor.assert_guards_intact()
    for part in memory.parts:
        part.assert_guards_intact()
        assert not part.elements[:PAD_BYTES].any()  # the pad is not staging


def test_staging_is_enough_for_every_smaller_call(on_cpu: Callable[[int], Ranks]) -> None:
    group = group_class(on_cpu(2))

    @settings(max_examples=300, deadline=None)
    @given(st.integers(0, 1 << 24), st.sampled_from(list(STORAGE)), st.integers(1, 200), st.floats(0, 1))
    def check(most_bytes: int, dtype: str, num_multiprocessors: int, share: float) -> None:
        count = int(share * most_bytes) // np.dtype(STORAGE[dtype]).itemsize
        there = Kernels.memory_bytes(most_bytes, num_multiprocessors) - backend_kernels._STAGING_AT
        grid = one_shot_grid(count, min(32, num_multiprocessors))
        assert group.staging_bytes(dtype, count, ONE_SHOT_CHUNK, grid) <= there
        assert there % 1024 == 0

    check()
