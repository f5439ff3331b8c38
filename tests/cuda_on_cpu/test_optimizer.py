"""Buckets, norms, AdamW and the fused ZeRO step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from tests.cuda_on_cpu.kernels import (
    CHUNK,
    DTYPES,
    AdamWOptions,
    ClipResult,
    Memory,
    Ranks,
    Segments,
    flat_layout,
    pointers,
)
from tests.cuda_on_cpu.test_collectives import NUM_SEEDS, assert_same_bits, host_reduced, squares_of
from tests.host.reduce_reference import Raw, narrow, some_sources, widen

MakeRanks = Callable[..., Ranks]
FLOATS = ["float32", "float16", "bfloat16"]
COUNTS = [3, 0, CHUNK, 700, 2 * CHUNK + 1]


def tensors_of(dtype: str, shift: int, seed: int) -> list[Memory]:
    """One tensor a parameter; the parameters of a bucket lie 5 elements apart, so misaligned there too."""
    return [Memory(some_sources(dtype, 1, count, seed + i)[0], shift) for i, count in enumerate(COUNTS)]


def canonical(dtype: str, raw: Raw) -> Raw:
    return narrow(dtype, widen(dtype, raw).copy())


@pytest.mark.parametrize(("tensor", "bucket"), list(product(FLOATS, FLOATS)))
@pytest.mark.parametrize(("accumulate", "scale"), [(False, 1.0), (False, 0.37), (True, 0.25)])
def test_gather_and_scatter(make_ranks: MakeRanks, tensor: str, bucket: str, accumulate: bool, scale: float) -> None:
    ranks = make_ranks(1)
    for seed in range(NUM_SEEDS):
        tensors = tensors_of(tensor, seed % 4, seed)
        parameters = Segments(COUNTS, 5 * (seed % 2), [memory.address for memory in tensors])
        layout = parameters.layout()
        before = some_sources(bucket, 1, parameters.num_elements, 9 + seed)[0]
        memory = Memory(before)
        squares, non_finite = np.zeros(parameters.num_chunks), ctypes.c_uint32(0)
        codes, factor = (DTYPES[tensor], DTYPES[bucket]), ctypes.c_float(scale)
        args = (int(accumulate), ctypes.c_void_p(squares.ctypes.data), ctypes.byref(non_finite))
        ranks.launch("bucket", 0, 1, ctypes.byref(layout), *codes, ctypes.c_void_p(memory.address), factor, *args)
        ranks.run(seed)

        wanted, chunk_squares = before.copy(), []
        for (first, count, _, _), source in zip(parameters.table, tensors, strict=True):
            place = slice(first, first + count)
            with np.errstate(all="ignore"):
                value = widen(tensor, source.elements) * np.float32(scale)
                if accumulate:
                    value = widen(bucket, wanted[place]) + value
                wanted[place] = narrow(bucket, value)
                starts = range(0, count, CHUNK)
                chunk_squares += [squares_of(bucket, wanted[place][at : at + CHUNK]) for at in starts]
        assert_same_bits(memory.elements, wanted)
        memory.assert_guards_intact()
        np.testing.assert_array_equal(squares, chunk_squares)
        assert non_finite.value == (not np.all(np.isfinite(chunk_squares)))

        ranks.launch(
            "bucket", 0, 0, ctypes.byref(layout), *codes, ctypes.c_void_p(memory.address), factor, 0, None, None
        )
        ranks.run(seed)
        for (first, count, _, _), target in zip(parameters.table, tensors, strict=True):
            with np.errstate(all="ignore"):
                values = narrow(tensor, widen(bucket, wanted[first : first + count]) * np.float32(scale))
            assert_same_bits(target.elements, values)
            target.assert_guards_intact()


def test_the_flag_stays_down_for_finite_values(make_ranks: MakeRanks) -> None:
    ranks = make_ranks(1)
    source = Memory(np.full(CHUNK, 3e38, np.float32))
    parameters = Segments([CHUNK], 0, [source.address])
    layout = parameters.layout()
    bucket, squares, non_finite = np.zeros(CHUNK, np.float32), np.zeros(1), ctypes.c_uint32(0)
    codes, factor = (DTYPES["float32"],) * 2, ctypes.c_float(1)
    args = (0, ctypes.c_void_p(squares.ctypes.data), ctypes.byref(non_finite))
    ranks.launch("bucket", 0, 1, ctypes.byref(layout), *codes, ctypes.c_void_p(bucket.ctypes.data), factor, *args)
    ranks.run(0)
    assert non_finite.value == 0
    source.elements[77] = np.inf
    ranks.launch("bucket", 0, 1, ctypes.byref(layout), *codes, ctypes.c_void_p(bucket.ctypes.data), factor, *args)
    ranks.run(0)
    assert non_finite.value == 1


def clip_of(ranks: Ranks, squares: np.ndarray, max_norm: float) -> ClipResult:
    result = ClipResult()
    address = ctypes.c_void_p(squares.ctypes.data)
    ranks.launch("norm", 0, address, ctypes.c_int64(len(squares)), ctypes.c_float(max_norm), ctypes.byref(result))
    ranks.run(0)
    return result


@pytest.mark.parametrize("num_squares", [0, 1, 255, 257, 1000])
def test_the_norm_adds_in_order(make_ranks: MakeRanks, num_squares: int) -> None:
    squares = np.random.default_rng(num_squares).exponential(size=num_squares) ** 8
    total = 0.0
    for square in squares:
        total += square
    norm = np.float32(np.sqrt(total))
    result = clip_of(make_ranks(1), squares, 0.5)
    assert (result.norm, result.skip) == (norm, 0)
    assert result.scale == min(np.float32(1), np.float32(0.5) / (norm + np.float32(1e-6)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_skips_the_step(make_ranks: MakeRanks, bad: float) -> None:
    assert clip_of(make_ranks(1), np.array([1.0, bad, 2.0]), 1.0).skip == 1


OPTIONS = AdamWOptions(1e-2, 0.9, 0.95, 1e-8, 0.1)


class Step:
    """The optimizer state of ``world`` ranks that share ``count`` parameters, and their fused steps."""

    def __init__(self, ranks: Ranks, count: int, param: str, shift: int = 0, master: bool = True) -> None:
        self.ranks, self.param, self.count = ranks, param, count
        world = ranks.num_ranks
        # Parts of whole chunks, as shards are cut; the last one has the rest.
        chunks = -(-count // CHUNK)
        self.cuts = [min(chunks * rank // world * CHUNK, count) for rank in range(world)] + [count]
        self.initial = np.random.default_rng(0).standard_normal(count).astype(np.float32)
        self.master = [self._own(self.initial, r) for r in range(world)] if master else None
        self.moments = [[self._own(np.zeros(count, np.float32), r) for r in range(world)] for _ in range(2)]
        self.params = [Memory(narrow(param, self.initial.copy()), shift) for _ in range(world)]

    def _own(self, values: np.ndarray, rank: int) -> Memory:
        return Memory(values[self.cuts[rank] : self.cuts[rank + 1]], rank % 2)

    def queue(
        self, grad: str, grads: list[Memory], step: int, clip: ClipResult | None = None, reduced: bool = False
    ) -> None:
        self.ranks.keep(grads, clip)
        for rank, first in enumerate(self.cuts[:-1]):
            owned = [None if self.master is None else self.master[rank].address]
            owned += [moment[rank].address for moment in self.moments]
            state = (ctypes.c_void_p * 3)(*owned)
            sources = [grads[rank].at(first)] if reduced else [memory.at(first) for memory in grads]
            targets = pointers([memory.at(first) for memory in self.params])
            sizes = (ctypes.c_int64(self.cuts[rank + 1] - first), DTYPES[grad], DTYPES[self.param])
            clipping = None if clip is None else ctypes.byref(clip)
            args = (pointers(sources), len(sources), 1, state, targets, ctypes.byref(OPTIONS), ctypes.c_int64(step))
            self.ranks.launch("sharded_adamw", rank, *sizes, *args, clipping)

    def gathered(self, parts: list[Memory]) -> np.ndarray:
        return np.concatenate([part.elements for part in parts])


def reference_step(
    p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """torch.optim.AdamW in float64 from the same state."""
    parameter = torch.nn.Parameter(torch.from_numpy(p.astype(np.float64)))
    options = {"lr": OPTIONS.lr, "betas": (OPTIONS.beta1, OPTIONS.beta2), "eps": OPTIONS.eps}
    optimizer = torch.optim.AdamW([parameter], **options, weight_decay=OPTIONS.weight_decay)
    moments = (torch.from_numpy(values.astype(np.float64)) for values in (m, v))
    optimizer.state[parameter] = dict(
        zip(("exp_avg", "exp_avg_sq", "step"), (*moments, torch.tensor(float(step - 1))), strict=True)
    )
    parameter.grad = torch.from_numpy(g.astype(np.float64))
    optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach().numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()


def assert_within_bound(
    before: tuple[np.ndarray, ...], after: tuple[np.ndarray, ...], g: np.ndarray, step: int
) -> None:
    """One step in fp32 against float64. u = 2**-24; factors that the host rounds to fp32 count as one rounding each.

    m: the factor, the difference and the product are off by u each relative to c * |g - m|, the sum by u of itself.
    v: the terms are positive, so relative: at most 4 roundings in a term and one in the sum: 5 u.
    denominator: v's 5 u halve under the root, and the root, its divisor, the quotient, eps and the sum add u each: 8 u.
    p: the decayed p is off by 2 u of itself; the update by 3 u + 8 u of itself and by m's error; the sum by u.
    One per cent on top covers the products of these.
    """
    u = 2.0**-24 * 1.01
    p, m, _ = (values.astype(np.float64) for values in before)
    wanted_p, wanted_m, wanted_v = reference_step(*before, g, step)
    m_error = u * (3 * (1 - OPTIONS.beta1) * np.abs(g - m) + np.abs(wanted_m))
    denominator = np.sqrt(wanted_v) / np.sqrt(1 - OPTIONS.beta2**step) + OPTIONS.eps
    per_m = OPTIONS.lr / (1 - OPTIONS.beta1**step) / denominator
    p_error = u * (2 * np.abs(p) + 11 * np.abs(wanted_m) * per_m + np.abs(wanted_p)) + m_error * per_m
    assert np.all(np.abs(after[1] - wanted_m) <= m_error)
    assert np.all(np.abs(after[2] - wanted_v) <= 5 * u * wanted_v)
    assert np.all(np.abs(after[0] - wanted_p) <= p_error)


def assert_documented_order(
    before: tuple[np.ndarray, ...], after: tuple[np.ndarray, ...], g: np.ndarray, step: int
) -> None:
    """The formula of sharded_adamw.cu in NumPy's fp32, which rounds every operation: the same bits."""
    f32 = np.float32
    p, m, v = before
    m = m + (g - m) * f32(1 - OPTIONS.beta1)
    v = v * f32(OPTIONS.beta2) + g * g * f32(1 - OPTIONS.beta2)
    denominator = np.sqrt(v) / f32(np.sqrt(1 - OPTIONS.beta2**step)) + f32(OPTIONS.eps)
    decayed = p * f32(1 - OPTIONS.lr * OPTIONS.weight_decay)
    p = decayed - m / denominator * f32(OPTIONS.lr / (1 - OPTIONS.beta1**step))
    for got, wanted in zip(after, (p, m, v), strict=True):
        assert_same_bits(got, wanted)


def gradients(dtype: str, world: int, count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [narrow(dtype, rng.standard_normal(count).astype(np.float32)) for _ in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("grad", "param"), list(product(FLOATS, FLOATS)))
def test_the_fused_step_is_adamw_of_the_average(make_ranks: MakeRanks, world: int, grad: str, param: str) -> None:
    count = (3 * CHUNK + 11, 13, 2 * CHUNK)[(world + FLOATS.index(param)) % 3]
    ranks = make_ranks(world)
    fused = Step(ranks, count, param, shift=world % 3)
    assert fused.master is not None
    for step in range(1, max(4, NUM_SEEDS)):
        raws = gradients(grad, world, count, step)
        grads = [Memory(raw, world % 4) for raw in raws]
        average = host_reduced("float32", "avg", [widen(grad, raw).copy() for raw in raws])
        before = tuple(fused.gathered(parts) for parts in (fused.master, *fused.moments))
        fused.queue(grad, grads, step)
        ranks.run(step * NUM_SEEDS)
        after = tuple(fused.gathered(parts) for parts in (fused.master, *fused.moments))
        assert_within_bound(before, after, average, step)
        assert_documented_order(before, after, average, step)
        for memory in fused.params:
            assert_same_bits(memory.elements, narrow(param, after[0].copy()))
            memory.assert_guards_intact()


@pytest.mark.parametrize("world", [2, 3, 8])
def test_bits_do_not_depend_on_sharding_or_fusion(make_ranks: MakeRanks, world: int) -> None:
    """The fused step of n ranks, the plain AdamW of one, and a step with a gradient that is reduced already."""
    count, grad = 5 * CHUNK + 3, "bfloat16"
    raws = gradients(grad, world, count, 1)
    average = host_reduced("float32", "avg", [widen(grad, raw).copy() for raw in raws])
    results = []
    for num_ranks, reduced in ((world, False), (1, True), (world, True)):
        ranks = make_ranks(num_ranks)
        case = Step(ranks, count, "float32", master=not reduced)
        for step in (1, 2):
            grads = [Memory(average) for _ in range(num_ranks)] if reduced else [Memory(raw) for raw in raws]
            case.queue("float32" if reduced else grad, grads, step, reduced=reduced)
            ranks.run(step)
        results.append([case.params[0].elements, *(case.gathered(moment) for moment in case.moments)])
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            assert_same_bits(got, wanted)


def test_clipping_scales_the_gradient_and_a_bad_norm_skips(make_ranks: MakeRanks) -> None:
    count = 2 * CHUNK
    ranks = make_ranks(2)
    raws = gradients("float32", 2, count, 0)
    average = host_reduced("float32", "avg", raws)
    clipped, by_hand = Step(ranks, count, "float32"), Step(ranks, count, "float32")
    clipped.queue("float32", [Memory(raw) for raw in raws], 1, ClipResult(2.0, 0.3, 0))
    grads = [Memory(average * np.float32(0.3)) for _ in range(2)]
    by_hand.queue("float32", grads, 1, reduced=True)
    ranks.run(0)
    assert_same_bits(clipped.params[1].elements, by_hand.params[0].elements)

    before = clipped.params[0].elements.copy()
    clipped.queue("float32", grads, 2, ClipResult(np.inf, 1.0, 1))
    ranks.run(0)
    assert_same_bits(clipped.params[0].elements, before)


def test_parameters_of_16_bits_need_a_master_copy(make_ranks: MakeRanks) -> None:
    ranks = make_ranks(1)
    step = Step(ranks, 8, "bfloat16", master=False)
    with pytest.raises(ValueError, match="need a master copy"):
        step.queue("float32", [Memory(np.zeros(8, np.float32))], 1)


def test_a_table_of_segments_is_needed(make_ranks: MakeRanks) -> None:
    layout = flat_layout(8)
    codes = (DTYPES["float32"],) * 2
    with pytest.raises(ValueError, match="no table"):
        make_ranks(1).launch("bucket", 0, 1, ctypes.byref(layout), *codes, None, ctypes.c_float(1), 0, None, None)
