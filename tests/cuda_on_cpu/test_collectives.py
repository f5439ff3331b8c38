"""The reducing kernels against the host transport's reductions, bit for bit, and the copying ones."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycomm import _C
from tests.cuda_on_cpu.kernels import CHUNK, DTYPES, OPS, Layout, Memory, Ranks, Segments, flat_layout, pointers
from tests.host.reduce_reference import CASES, STORAGE, Raw, bits_of, narrow, some_sources, widen

MakeRanks = Callable[..., Ranks]
NUM_SEEDS = int(os.environ.get("PYCOMM_TEST_SEEDS", "4"))  # schedules of each case
WORLDS = [1, 2, 3, 4, 8]
MAP_NORESERVE = 0x4000  # Linux's; the module has it from Python 3.13 on
# Nothing, tails of a group of eight, of a warp's 256 and of a chunk, and more chunks than warps.
COUNTS = [0, 1, 13, 1027, 5 * CHUNK + 9]


def host_reduced(dtype: str, op: str, sources: list[Raw]) -> Raw:
    """What the host transport computes."""
    sources = [np.ascontiguousarray(source) for source in sources]
    result = np.empty_like(sources[0])
    _C.reduce(dtype, op, [s.ctypes.data for s in sources], [result.ctypes.data], len(result))
    return result


def assert_same_bits(got: Raw, wanted: Raw) -> None:
    np.testing.assert_array_equal(bits_of(got), bits_of(wanted))


def squares_of(dtype: str, raw: Raw) -> float:
    """The sum of squares of one chunk as docs/determinism.md defines it: lane l has groups of eight l, l + 32, …"""
    squares = np.zeros((CHUNK // 256, 32, 8))
    squares.reshape(-1)[: len(raw)] = widen(dtype, raw).astype(np.float64) ** 2
    lanes = np.zeros(32)
    for group in squares:
        for element in group.T:
            lanes = lanes + element
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[np.arange(32) ^ distance]
    return float(lanes[0])


def shifts_of(seed: int, num: int) -> list[int]:
    """Where each rank's tensor starts: all at a 16-byte boundary, or each elsewhere."""
    return [0] * num if seed % 2 == 0 else [(seed + 3 * rank) % 5 for rank in range(num)]


class OneShot:
    """Calls of one-shot all-reduce that share a staging memory."""

    def __init__(self, ranks: Ranks, count: int, wire: str, chunk: int = CHUNK) -> None:
        self.ranks, self.wire, self.layout = ranks, wire, flat_layout(count, chunk)
        self.bytes = max(ranks.staging_bytes(self.layout, wire), 64 * 16)
        self.staging = [Memory(np.zeros(self.bytes, np.uint8)) for _ in range(ranks.num_ranks)]
        self.squares = [np.zeros(self.layout.num_chunks) for _ in range(ranks.num_ranks)]

    def queue(self, dtype: str, op: str, inputs: list[Memory], outputs: list[Memory]) -> None:
        codes = (DTYPES[dtype], DTYPES[self.wire], OPS[op])
        self.ranks.keep(self, inputs, outputs)
        for rank in range(self.ranks.num_ranks):
            squares = ctypes.c_void_p(self.squares[rank].ctypes.data)
            addresses = [ctypes.c_void_p(memory.address) for memory in (inputs[rank], outputs[rank])]
            staging = pointers([memory.address for memory in self.staging])
            args = (*codes, *addresses, staging, ctypes.c_size_t(self.bytes), squares)
            self.ranks.launch("all_reduce_one_shot", rank, ctypes.byref(self.layout), *args)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("dtype", "op"), CASES)
def test_one_shot_all_reduce(make_ranks: MakeRanks, world: int, dtype: str, op: str) -> None:
    ranks = make_ranks(world)
    for seed in range(NUM_SEEDS):
        count = COUNTS[(seed + world + OPS[op]) % len(COUNTS)]
        sources = some_sources(dtype, world, count, seed)
        memories = [Memory(raw, shift) for raw, shift in zip(sources, shifts_of(seed, world), strict=True)]
        one_shot = OneShot(ranks, count, dtype, chunk=256)
        one_shot.queue(dtype, op, memories, memories)
        ranks.run(seed)
        wanted = host_reduced(dtype, op, sources)
        for memory in memories:
            assert_same_bits(memory.elements, wanted)
            memory.assert_guards_intact()


def queue_two_shot(ranks: Ranks, layout: Layout, dtype: str, op: str, addresses: list[int]) -> None:
    data = pointers(addresses)
    for rank in range(ranks.num_ranks):
        ranks.launch("all_reduce_two_shot", rank, ctypes.byref(layout), DTYPES[dtype], OPS[op], data, None)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("dtype", "op"), CASES)
def test_two_shot_all_reduce(make_ranks: MakeRanks, world: int, dtype: str, op: str) -> None:
    ranks = make_ranks(world)
    for seed in range(NUM_SEEDS):
        count = COUNTS[(seed + world + OPS[op]) % len(COUNTS)]
        sources = some_sources(dtype, world, count, seed)
        memories = [Memory(raw, shift) for raw, shift in zip(sources, shifts_of(seed, world), strict=True)]
        queue_two_shot(ranks, flat_layout(count), dtype, op, [memory.address for memory in memories])
        ranks.run(seed)
        wanted = host_reduced(dtype, op, sources)
        for memory in memories:
            assert_same_bits(memory.elements, wanted)
            memory.assert_guards_intact()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("dtype", "op"), CASES)
def test_reduce_scatter_of_uneven_parts(make_ranks: MakeRanks, world: int, dtype: str, op: str) -> None:
    ranks = make_ranks(world)
    for seed in range(NUM_SEEDS):
        counts = [COUNTS[(seed + rank + OPS[op]) % len(COUNTS)] for rank in range(world)]
        firsts = np.cumsum([0, *counts])
        sources = some_sources(dtype, world, int(firsts[-1]), seed)
        inputs = [Memory(raw, shift) for raw, shift in zip(sources, shifts_of(seed, world), strict=True)]
        outputs = [Memory(np.zeros(count, STORAGE[dtype]), seed % 3) for count in counts]
        for rank in range(world):
            layout = flat_layout(counts[rank])
            parts = pointers([memory.at(int(firsts[rank])) for memory in inputs])
            codes = (DTYPES[dtype], DTYPES[dtype], OPS[op])
            output = ctypes.c_void_p(outputs[rank].address)
            ranks.launch("reduce_scatter", rank, ctypes.byref(layout), *codes, parts, output, None)
        ranks.run(seed)
        wanted = host_reduced(dtype, op, sources)
        for rank, output in enumerate(outputs):
            assert_same_bits(output.elements, wanted[firsts[rank] : firsts[rank + 1]])
            output.assert_guards_intact()
        for memory, raw in zip(inputs, sources, strict=True):
            assert_same_bits(memory.elements, raw)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_sixteen_bits_on_the_wire_and_float32_sums(make_ranks: MakeRanks, world: int, wire: str) -> None:
    count = 2 * CHUNK + 5
    ranks = make_ranks(world)
    sources = some_sources("float32", world, count, 3)
    with np.errstate(over="ignore"):
        cast = [narrow(wire, raw) for raw in sources]
    # Sums of the cast values in fp32, as the host makes them of float32 tensors; one rank's are only cast.
    wanted = host_reduced("float32", "avg", [widen(wire, raw).copy() for raw in cast])
    canonical = np.where(np.isnan(wanted), np.float32(np.nan), wanted)

    memories = [Memory(raw) for raw in sources]
    one_shot = OneShot(ranks, count, wire)
    one_shot.queue("float32", "avg", memories, memories)
    inputs = [Memory(raw) for raw in cast]
    outputs = [Memory(np.zeros(count, np.float32)) for _ in range(world)]
    for rank in range(world):
        codes = (DTYPES[wire], DTYPES["float32"], OPS["avg"])
        output = ctypes.c_void_p(outputs[rank].address)
        layout = flat_layout(count)
        parts = pointers([memory.address for memory in inputs])
        ranks.launch("reduce_scatter", rank, ctypes.byref(layout), *codes, parts, output, None)
    ranks.run(5)
    for memory in memories + outputs:
        assert_same_bits(memory.elements, canonical)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_squares_are_the_same_on_every_rank_and_in_every_kernel(make_ranks: MakeRanks, world: int, dtype: str) -> None:
    parameters = Segments([700, 0, CHUNK, 3 * CHUNK + 77, 5], gap=3)
    ranks = make_ranks(world)
    sources = some_sources(dtype, world, parameters.num_elements, 1)
    for raw in sources:
        bits_of(raw)[:] &= bits_of(raw).dtype.type(0xBFFF_FFFF if dtype == "float32" else 0xBFFF)  # no NaN: below 2
    reduced = host_reduced(dtype, "avg", sources)
    wanted = [
        squares_of(dtype, reduced[first + start : first + min(start + CHUNK, count)])
        for first, count, _, _ in parameters.table
        for start in range(0, count, CHUNK)
    ]
    two_shot = [np.zeros(parameters.num_chunks) for _ in range(world)]
    scattered = [np.zeros(parameters.num_chunks) for _ in range(world)]
    memories, inputs = ([Memory(raw) for raw in sources] for _ in range(2))
    layout = parameters.layout()
    for rank in range(world):
        data = pointers([memory.address for memory in memories])
        squares = pointers([array.ctypes.data for array in two_shot])
        ranks.launch("all_reduce_two_shot", rank, ctypes.byref(layout), DTYPES[dtype], OPS["avg"], data, squares)
    # Rank 0 has all of the bucket and the others nothing: only the shares differ from a real reduce-scatter.
    output = Memory(np.zeros(parameters.num_elements, STORAGE[dtype]))
    for rank in range(world):
        own = layout if rank == 0 else flat_layout(0)
        codes = (DTYPES[dtype], DTYPES[dtype], OPS["avg"])
        parts = pointers([memory.address for memory in inputs])
        squares = pointers([array.ctypes.data for array in scattered])
        address = ctypes.c_void_p(output.address)
        ranks.launch("reduce_scatter", rank, ctypes.byref(own), *codes, parts, address, squares)
    ranks.run(2)
    for got in (*two_shot, *scattered):
        np.testing.assert_array_equal(got, wanted)
    for first, count, _, _ in parameters.table:
        assert_same_bits(memories[-1].elements[first : first + count], reduced[first : first + count])
    gaps = np.ones(parameters.num_elements, bool)
    for first, count, _, _ in parameters.table:
        gaps[first : first + count] = False
    assert_same_bits(memories[0].elements[gaps], sources[0][gaps])


def test_one_shot_calls_follow_each_other_in_place(make_ranks: MakeRanks) -> None:
    """Two sets of staging, grids that differ from call to call, other kernels in between."""
    world, count = 3, 3 * CHUNK + 1
    for seed in range(4 * NUM_SEEDS):
        ranks = make_ranks(world)
        sources = [np.arange(count, dtype=np.int32) % 17 + rank for rank in range(world)]
        memories = [Memory(raw) for raw in sources]
        one_shot = OneShot(ranks, count, "int32")
        one_shot.bytes *= 4  # enough for the smaller grid
        one_shot.staging = [Memory(np.zeros(one_shot.bytes, np.uint8)) for _ in range(world)]
        for ranks.blocks in (2, 1, 2, 2, 1):
            one_shot.queue("int32", "sum", memories, memories)
        queue_two_shot(ranks, flat_layout(count), "int32", "sum", [memory.address for memory in memories])
        one_shot.queue("int32", "sum", memories, memories)
        ranks.run(seed)
        total = sum(sources) * world**6
        for memory in memories:
            np.testing.assert_array_equal(memory.elements, total)


@pytest.mark.parametrize("world", [5, 16])
@pytest.mark.parametrize(("dtype", "op"), [("bfloat16", "avg"), ("int32", "sum")])
def test_any_number_of_ranks_up_to_the_limit(make_ranks: MakeRanks, world: int, dtype: str, op: str) -> None:
    count = 17 * CHUNK + 3
    sources = some_sources(dtype, world, count, world)
    first, second = (
        [Memory(raw, shift) for raw, shift in zip(sources, shifts_of(1, world), strict=True)] for _ in "12"
    )
    ranks = make_ranks(world)
    OneShot(ranks, count, dtype).queue(dtype, op, first, first)
    queue_two_shot(ranks, flat_layout(count), dtype, op, [memory.address for memory in second])
    ranks.run(world)
    wanted = host_reduced(dtype, op, sources)
    for memory in first + second:
        assert_same_bits(memory.elements, wanted)


def test_parameters_beyond_four_gigabytes(make_ranks: MakeRanks) -> None:
    """Only the pages that are touched are there."""
    ranks, counts, gap = make_ranks(2), [CHUNK + 1, 7], 2**32 + 5
    parameters = Segments(counts, gap)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    tensors = [np.frombuffer(mmap.mmap(-1, parameters.num_elements, flags=flags), np.uint8) for _ in range(2)]
    places = [slice(first, first + count) for first, count, _, _ in parameters.table]
    for seed, place in enumerate(places):
        for rank, tensor in enumerate(tensors):
            tensor[place] = some_sources("uint8", 2, counts[seed], seed)[rank]
    wanted = [tensors[0][place] + tensors[1][place] for place in places]
    queue_two_shot(ranks, parameters.layout(), "uint8", "sum", [tensor.ctypes.data for tensor in tensors])
    ranks.run(0)
    for place, sums in zip(places, wanted, strict=True):
        for tensor in tensors:
            np.testing.assert_array_equal(tensor[place], sums)


@given(st.integers(0, 2**41), st.sampled_from([1, 16]), st.integers(1, 128))
def test_parts_are_even_and_leave_nothing_out(library: ctypes.CDLL, count: int, unit: int, num: int) -> None:
    bounds = np.zeros((num, 2), np.int64)
    for index in range(num):
        address = ctypes.c_void_p(bounds[index].ctypes.data)
        library.bounds_of_part(ctypes.c_int64(count), ctypes.c_int64(unit), index, num, address)
    assert bounds[0, 0] == 0
    assert bounds[-1, 1] == count
    np.testing.assert_array_equal(bounds[1:, 0], bounds[:-1, 1])
    assert np.all((bounds[:, 0] % unit == 0) | (bounds[:, 0] == count))
    sizes = bounds[:, 1] - bounds[:, 0]
    assert sizes.max() - sizes.min() <= 2 * unit - 1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("shift", [0, 1, 7])
def test_all_gather_of_uneven_parts(make_ranks: MakeRanks, world: int, shift: int) -> None:
    ranks = make_ranks(world)
    for seed in range(NUM_SEEDS):
        sizes = [(0, 1, 37, 5000)[(seed + rank) % 4] for rank in range(world)]
        firsts = np.cumsum([0, *sizes])
        parts = some_sources("uint8", 1, int(firsts[-1]), seed)[0]
        inputs = [Memory(parts[firsts[r] : firsts[r + 1]], shift) for r in range(world)]
        outputs = [Memory(np.zeros(len(parts), np.uint8), seed % 2 * rank) for rank in range(world)]
        for rank in range(world):
            targets = pointers([memory.at(int(firsts[rank])) for memory in outputs])
            source = ctypes.c_void_p(inputs[rank].address)
            ranks.launch("all_gather", rank, source, ctypes.c_int64(sizes[rank]), targets)
        ranks.run(seed)
        for output in outputs:
            np.testing.assert_array_equal(output.elements, parts)
            output.assert_guards_intact()
