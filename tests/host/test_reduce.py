"""The host reductions, bit for bit: against NumPy and torch in rank order, and every SIMD level against the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pycomm import _C
from tests.host.reduce_reference import (
    CASES,
    INTEGERS,
    NAN_BITS,
    STORAGE,
    Raw,
    bits_of,
    narrow,
    reference,
    some_sources,
    widen,
)

COUNTS = [0, 1, 7, 31, 1023, 1025, 2080]  # around the 1024 elements of a block, and tails of every vector width
GUARD_BYTES = 64


@dataclass
class Buffer:
    """``count`` elements at any alignment, between guard bytes that nobody may touch."""

    memory: np.ndarray
    start: int
    num_bytes: int

    @classmethod
    def holding(cls, raw: Raw, offset: int) -> Buffer:
        memory = np.full(raw.nbytes + 2 * GUARD_BYTES + offset, 0xA5, np.uint8)
        start = GUARD_BYTES + offset
        memory[start : start + raw.nbytes] = raw.view(np.uint8)
        return cls(memory, start, raw.nbytes)

    @property
    def address(self) -> int:
        return self.memory.ctypes.data + self.start

    def elements(self, dtype: str) -> Raw:
        return self.memory[self.start : self.start + self.num_bytes].copy().view(STORAGE[dtype])

    def assert_guards_intact(self) -> None:
        assert np.all(self.memory[: self.start] == 0xA5)
        assert np.all(self.memory[self.start + self.num_bytes :] == 0xA5)


def reduced(
    dtype: str, op: str, sources: list[Raw], num_dst: int, *, in_place: bool, offset: int = 0, cuts: Sequence[int] = ()
) -> list[Raw]:
    """What each destination holds after a call (or after one call per piece between ``cuts``); checks all else."""
    count, itemsize = len(sources[0]), sources[0].itemsize
    src = [Buffer.holding(raw, offset + 3 * j * (offset > 0)) for j, raw in enumerate(sources)]
    dst = src[:num_dst] if in_place else [Buffer.holding(np.zeros_like(sources[0]), offset) for _ in range(num_dst)]
    bounds = [0, *sorted(cuts), count]
    for begin, end in pairwise(bounds):
        shift = begin * itemsize
        _C.reduce(dtype, op, [b.address + shift for b in src], [b.address + shift for b in dst], end - begin)
    for buffer in src + dst:
        buffer.assert_guards_intact()
    first_untouched = num_dst if in_place else 0
    for buffer, raw in zip(src[first_untouched:], sources[first_untouched:], strict=True):
        np.testing.assert_array_equal(bits_of(buffer.elements(dtype)), bits_of(raw))
    return [buffer.elements(dtype) for buffer in dst]


@contextmanager
def simd_level(name: str) -> Iterator[None]:
    before = _C.simd_level()
    _C.set_simd_level(name)
    try:
        yield
    finally:
        _C.set_simd_level(before)


def supported_levels() -> list[str]:
    levels = ["baseline", "avx2", "avx512"]
    return levels[: levels.index(_C.best_simd_level()) + 1]


def assert_same_bits(actual: list[Raw], expected: Raw, what: str) -> None:
    for k, raw in enumerate(actual):
        np.testing.assert_array_equal(bits_of(raw), bits_of(expected), err_msg=f"{what}, destination {k}")


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "out_of_place"])
@pytest.mark.parametrize(("dtype", "op"), CASES)
def test_every_shape_equals_the_reference_at_every_level(dtype: str, op: str, in_place: bool) -> None:
    for num_src in range(1, 6):
        for count in COUNTS:
            sources = some_sources(dtype, num_src, count, seed=count)
            expected = reference(dtype, op, sources)
            for num_dst in range(1, num_src + 1):
                for level in supported_levels():
                    with simd_level(level):
                        actual = reduced(dtype, op, sources, num_dst, in_place=in_place)
                    assert_same_bits(actual, expected, f"{num_src} sources of {count} at {level}")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_alignment_and_splits_do_not_change_a_bit(data: st.DataObject) -> None:
    dtype, op = data.draw(st.sampled_from(CASES))
    num_src = data.draw(st.integers(1, 7))
    num_dst = data.draw(st.integers(1, num_src))
    count = data.draw(st.integers(0, 3000))
    offset = data.draw(st.integers(0, 63))
    cuts = data.draw(st.lists(st.integers(0, count), max_size=4))
    in_place = data.draw(st.booleans())
    sources = some_sources(dtype, num_src, count, seed=data.draw(st.integers(0, 2**32 - 1)))
    expected = reference(dtype, op, sources)
    for level in supported_levels():
        with simd_level(level):
            actual = reduced(dtype, op, sources, num_dst, in_place=in_place, offset=offset, cuts=cuts)
        assert_same_bits(actual, expected, level)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value_survives_conversion_and_products_round_once(dtype: str) -> None:
    every = np.arange(65536, dtype=np.uint16).view(STORAGE[dtype])
    one = narrow(dtype, np.ones(65536, np.float32))
    shuffled = np.random.default_rng(1).permutation(every)
    for level in supported_levels():
        with simd_level(level):
            (same,) = reduced(dtype, "prod", [every, one], 1, in_place=False)
            (product,) = reduced(dtype, "prod", [every, shuffled], 1, in_place=False)
        is_nan = np.isnan(widen(dtype, every))
        np.testing.assert_array_equal(bits_of(same)[~is_nan], bits_of(every)[~is_nan], err_msg=level)
        assert np.all(bits_of(same)[is_nan] == NAN_BITS[dtype])
        assert_same_bits([product], reference(dtype, "prod", [every, shuffled]), level)


def test_float16_is_exact_when_the_thread_flushes_subnormals() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    shuffled = np.random.default_rng(2).permutation(every)
    expected = {op: reference("float16", op, [every, shuffled]) for op in ("sum", "prod", "min")}
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        for level in supported_levels():
            for op, result in expected.items():
                with simd_level(level):
                    actual = reduced("float16", op, [every, shuffled], 2, in_place=True)
                assert_same_bits(actual, result, f"{op} at {level}")
    finally:
        torch.set_flush_denormal(False)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("dtype", "op", "values", "expected"),
    [
        ("float32", "sum", [-0.0, -0.0], -0.0),
        ("float32", "sum", [INF, -INF], NAN),
        ("float32", "sum", [1e-45, 1e-45], 3e-45),  # subnormals are not flushed
        ("float32", "sum", [1e8, -1e8, 1.0], 1.0),  # rank order: ...
        ("float32", "sum", [1.0, 1e8, -1e8], 0.0),  # ... 1 + 1e8 rounds to 1e8
        ("float32", "min", [NAN, 1.0], NAN),
        ("float32", "min", [1.0, NAN, 0.0], NAN),
        ("float64", "max", [NAN, INF], NAN),
        ("float64", "max", [-INF, NAN], NAN),
        ("float32", "min", [0.0, -0.0], 0.0),  # equal: the earlier rank's
        ("float32", "min", [-0.0, 0.0], -0.0),
        ("float32", "max", [-0.0, 0.0], -0.0),
        ("float16", "sum", [65504.0, 65504.0], INF),
        ("float16", "avg", [65504.0, 65504.0, 65504.0], 65504.0),  # the fp32 accumulator does not overflow
        ("float16", "avg", [2.0**-24, 2.0**-24], 2.0**-24),
        ("float16", "prod", [2.0**-24, 0.5], 0.0),  # a tie, to even
        ("float16", "prod", [-3 * 2.0**-24, 0.5], -(2.0**-23)),  # a tie, to even
        ("bfloat16", "sum", [1.0, 2.0**-8, 2.0**-8], 1.0 + 2.0**-7),  # rounding at each step would give 1
        ("float16", "sum", [1.0, 2.0**-11, 2.0**-11], 1.0 + 2.0**-10),  # likewise
        ("bfloat16", "max", [NAN, 1.0], NAN),
        ("int8", "sum", [127, 1], -128),
        ("uint8", "prod", [16, 17], 16),
        ("uint8", "max", [200, 100], 200),
        ("int8", "max", [-56, 100], 100),
        ("int32", "sum", [2**31 - 1, 1], -(2**31)),
        ("int32", "prod", [-(2**31), -1], -(2**31)),
        ("int64", "prod", [2**63 - 1, 2], -2),
        ("int64", "min", [-(2**63), 2**63 - 1, 0], -(2**63)),
    ],
)
def test_special_values(level: str, dtype: str, op: str, values: list[float], expected: float) -> None:
    if level not in supported_levels():
        pytest.skip(f"this processor has no {level}")
    count = 70  # full vectors and a tail, at every level
    accumulator = np.float32 if dtype in ("float16", "bfloat16") else STORAGE[dtype]
    sources = [narrow(dtype, np.full(count, value, accumulator)) for value in values]
    with simd_level(level):
        actual = reduced(dtype, op, sources, 1, in_place=False)
    assert_same_bits(actual, narrow(dtype, np.full(count, expected, accumulator)), f"{op} of {values}")


@pytest.mark.parametrize(("dtype", "signalling"), [("float16", 0x7C01), ("bfloat16", 0x7F81), ("bfloat16", 0xFFFF)])
def test_nan_payloads_never_become_infinity_or_zero(dtype: str, signalling: int) -> None:
    nan = np.full(70, signalling, np.uint16).view(STORAGE[dtype])
    one = narrow(dtype, np.ones(70, np.float32))
    for level in supported_levels():
        for sources in ([nan, one], [one, nan], [nan, nan]):
            for op in ("sum", "avg", "min", "max", "prod"):
                with simd_level(level):
                    (result,) = reduced(dtype, op, sources, 1, in_place=False)
                assert np.all(bits_of(result) == NAN_BITS[dtype]), (level, op)


def test_an_unknown_level_is_refused_with_the_known_ones() -> None:
    before = _C.simd_level()
    with pytest.raises(ValueError, match=r"avx-512.*baseline, avx2, avx512"):
        _C.set_simd_level("avx-512")
    assert _C.simd_level() == before


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_a_level_the_processor_lacks_is_refused(level: str) -> None:
    if level in supported_levels():
        pytest.skip(f"this processor has {level}")
    with pytest.raises(ValueError, match=f"{level}.*not supported.*baseline"):
        _C.set_simd_level(level)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_an_average_of_integers_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"avg.*{dtype}"):
        reduced(dtype, "avg", some_sources(dtype, 2, 4, seed=0), 1, in_place=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("float8", "sum", [64], [64], 0), "float8.*float32, float64"),
        (("float32", "mean", [64], [64], 0), "mean.*sum, avg"),
        (("float32", "sum", [], [64], 0), "sources is empty"),
        (("float32", "sum", [64], [], 0), "destinations is empty"),
        (("float32", "sum", [64, 0], [64], 1), "sources holds a null pointer"),
    ],
)
def test_wrong_arguments_are_refused(args: tuple[str, str, list[int], list[int], int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.reduce(*args)
