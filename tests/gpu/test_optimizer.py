"""Buckets, norms, AdamW and the fused ZeRO step on a GPU, against NumPy's definition of them, bit for bit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from pycomm.gpu import Bucket, KernelRanks
from tests.cuda_on_cpu.test_collectives import CHUNK, assert_same_bits, host_reduced, squares_of
from tests.cuda_on_cpu.test_optimizer import COUNTS, FLOATS, OPTIONS, assert_documented_order, gradients
from tests.gpu.helpers import KERNEL_TIMEOUT_S, from_gpu, to_gpu
from tests.host.reduce_reference import narrow, some_sources, widen

HYPERPARAMETERS = (OPTIONS.lr, OPTIONS.beta1, OPTIONS.beta2, OPTIONS.eps, OPTIONS.weight_decay)


@pytest.fixture(scope="module")
def one() -> KernelRanks:
    return KernelRanks.virtual(1, timeout_s=KERNEL_TIMEOUT_S)


@pytest.mark.parametrize(("tensor", "bucket"), list(product(FLOATS, FLOATS)))
@pytest.mark.parametrize(("accumulate", "scale"), [(False, 1.0), (True, 0.25)])
def test_gather_and_scatter(one, tensor, bucket, accumulate, scale):
    sources = [some_sources(tensor, 1, count, seed)[0] for seed, count in enumerate(COUNTS)]
    flat = Bucket([to_gpu(tensor, raw) for raw in sources], getattr(torch, bucket))
    before = some_sources(bucket, 1, sum(COUNTS), 9)[0]
    flat.memory.copy_(to_gpu(bucket, before))
    one.bucket_gather(flat, scale, accumulate=accumulate, norm=True)
    one.synchronize()
    wanted, squares, first = before.copy(), [], 0
    with np.errstate(all="ignore"):
        for raw in sources:
            place = slice(first, first + len(raw))
            value = widen(tensor, raw) * np.float32(scale)
            wanted[place] = narrow(bucket, widen(bucket, wanted[place]) + value if accumulate else value)
            squares += [squares_of(bucket, wanted[place][at : at + CHUNK]) for at in range(0, len(raw), CHUNK)]
            first += len(raw)
    assert_same_bits(from_gpu(bucket, flat.memory), wanted)
    np.testing.assert_array_equal(flat.squares.cpu().numpy(), squares)
    assert bool(flat.non_finite.item()) == (not np.all(np.isfinite(squares)))

    one.bucket_scatter(flat, scale)
    one.synchronize()
    first = 0
    for target in flat.tensors:
        with np.errstate(all="ignore"):
            values = narrow(tensor, widen(bucket, wanted[first : first + len(target)]) * np.float32(scale))
        assert_same_bits(from_gpu(tensor, target), values)
        first += len(target)


@pytest.mark.parametrize("num_squares", [1, 257, 10_000])
def test_the_norm_adds_in_order(one, num_squares):
    squares = np.random.default_rng(num_squares).exponential(size=num_squares) ** 8
    total = 0.0
    for square in squares:
        total += square
    result, on_gpu = torch.empty(3, device="cuda"), torch.from_numpy(squares).cuda()
    one.norm(on_gpu, 0.5, result)
    one.synchronize()
    norm = np.float32(np.sqrt(total))
    assert result.tolist() == [norm, min(np.float32(1), np.float32(0.5) / (norm + np.float32(1e-6))), 0.0]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize(("grad", "param"), list(product(FLOATS, FLOATS)))
def test_the_fused_step_is_adamw_of_the_average(world, grad, param):
    ranks, count = KernelRanks.virtual(world, timeout_s=KERNEL_TIMEOUT_S), world * (2 * CHUNK + 24)
    initial = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    whole = {"master": torch.from_numpy(initial).cuda(), "m": torch.zeros(count).cuda(), "v": torch.zeros(count).cuda()}
    params = [to_gpu(param, narrow(param, initial.copy())) for _ in range(world)]
    part = count // world
    states = [tuple(values[r * part : (r + 1) * part] for values in whole.values()) for r in range(world)]
    for step in (1, 2):
        raws = gradients(grad, world, count, step)
        average = host_reduced("float32", "avg", [widen(grad, raw).copy() for raw in raws])
        before = tuple(values.cpu().numpy().copy() for values in whole.values())
        grads = [to_gpu(grad, raw) for raw in raws]
        ranks.sharded_adamw(params, grads, states, (*HYPERPARAMETERS, step))
        ranks.synchronize()
        after = tuple(values.cpu().numpy() for values in whole.values())
        assert_documented_order(before, after, average, step)
        for tensor in params:
            assert_same_bits(from_gpu(param, tensor), narrow(param, after[0].copy()))


def test_clipping_by_a_norm_that_stays_on_the_device():
    world, count = 2, 2 * 4 * CHUNK
    ranks = KernelRanks.virtual(world, timeout_s=KERNEL_TIMEOUT_S)
    raws = gradients("float32", world, count, 0)
    average = host_reduced("float32", "avg", raws)
    inputs = [to_gpu("float32", raw) for raw in raws]
    parts = [torch.empty(count // world, device="cuda") for _ in range(world)]
    squares = [torch.zeros(count // CHUNK, dtype=torch.float64, device="cuda") for _ in range(world)]
    clip = torch.empty(3, device="cuda")
    params = [torch.zeros(count, device="cuda") for _ in range(world)]
    states = [tuple(torch.zeros(count // world, device="cuda") for _ in range(3)) for _ in range(world)]
    ranks.reduce_scatter(parts, inputs, "avg", squares=squares)
    ranks.norm(squares[0], 0.1, clip)
    ranks.sharded_adamw(params, parts, states, (*HYPERPARAMETERS, 1), clip=[clip, clip])
    ranks.synchronize()
    norm, scale, _ = clip.tolist()
    assert norm == pytest.approx(float(np.linalg.norm(average.astype(np.float64))), rel=1e-6)
    moments = [np.zeros(count, np.float32) for _ in range(3)]
    got = [torch.cat([state[i] for state in states]).cpu().numpy() for i in range(3)]
    assert_documented_order(tuple(moments), tuple(got), average * np.float32(scale), 1)
    assert torch.equal(params[0], params[1])


def test_a_norm_that_is_not_finite_skips_the_step():
    ranks = KernelRanks.virtual(2, timeout_s=KERNEL_TIMEOUT_S)
    params = [torch.ones(2048, device="cuda") for _ in range(2)]
    states = [(None, torch.zeros(1024, device="cuda"), torch.zeros(1024, device="cuda")) for _ in range(2)]
    clip = torch.empty(3, device="cuda")
    squares = torch.full((4,), float("nan"), dtype=torch.float64, device="cuda")
    ranks.norm(squares, 1.0, clip)
    ranks.sharded_adamw(params, params, states, (*HYPERPARAMETERS, 1), clip=[clip, clip])
    ranks.synchronize()
    assert all(tensor.eq(1).all() for tensor in params)
