"""Overlapped products on a GPU. Whole numbers make every sum exact, so results are compared bit for bit."""

from __future__ import annotations

import pytest
import torch

from pycomm.errors import PeerTimeoutError
from pycomm.gpu import KernelRanks, OverlappedMatmuls
from tests.gpu.helpers import KERNEL_TIMEOUT_S

OPS = ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# |sums| stay below 256, which bfloat16 holds exactly: 8 ranks of 16 products of -1, 0 and 1.
IN, OUT = 16, 24


def tensors_of(op, rows, dtype, seed):
    """x and weight of every rank, and what each shall get."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=generator).to("cuda", torch.float64)

    total = sum(rows)
    xs = [draw(count if op == OPS[0] else total, IN) for count in rows]
    weights = [draw(OUT, IN) for _ in rows]
    if op == OPS[0]:
        outs = [torch.cat(xs) @ weight.T for weight in weights]
    else:
        whole = sum(x @ weight.T for x, weight in zip(xs, weights, strict=True))
        outs = list(whole.split(list(rows))) if op == OPS[1] else [whole] * len(rows)
    return tuple([tensor.to(dtype) for tensor in tensors] for tensors in (xs, weights, outs))


def uneven(world, seed):
    return [(40, 0, 96, 1, 70)[(rank + seed) % 5] for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_pieces": 3, "num_lanes": 2, "comm_multiprocessors": 16}], ids=str)
def test_calls_follow_each_other(world, dtype, options):
    ranks = KernelRanks.virtual(world, timeout_s=KERNEL_TIMEOUT_S)
    matmuls = OverlappedMatmuls(ranks, [96] * world, IN, OUT, dtype, **options)
    checks = []
    for seed, op in enumerate(OPS * 2):
        rows = uneven(world, seed)
        xs, weights, wanted = tensors_of(op, rows, dtype, seed)
        if seed % 2 == 1:
            weights = [weight.t().contiguous() for weight in weights]
        got = getattr(matmuls, op)(xs, weights, rows, transposed=seed % 2 == 1, one_by_one=seed % 3 == 2)
        checks.append((got, wanted, (xs, weights)))
    matmuls.synchronize(30.0)
    for got, wanted, _ in checks:
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("op", OPS)
def test_one_by_one_has_the_same_bits(op):
    """Of random numbers, where the order of a sum, or another algorithm, would show."""
    world, rows, size = 3, [300, 0, 213], 512
    ranks = KernelRanks.virtual(world, timeout_s=KERNEL_TIMEOUT_S)
    matmuls = OverlappedMatmuls(ranks, rows, size, size, torch.bfloat16, num_pieces=2)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(count):
        return torch.randn(count, size, generator=generator, device="cuda").bfloat16()

    xs = [draw(count if op == OPS[0] else sum(rows)) for count in rows]
    weights = [draw(size) for _ in range(world)]
    first = getattr(matmuls, op)(xs, weights, rows)
    second = getattr(matmuls, op)(xs, weights, rows, one_by_one=True)
    if op == OPS[0]:  # read behind the call, on its stream
        gathered = matmuls.gathered(rows, size)
        assert torch.equal(gathered[rows[0] :], torch.cat(xs[1:]))
    matmuls.synchronize(30.0)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", OPS)
def test_large_products_are_as_torchs(op):
    """In bfloat16: each partial product and each result is rounded once: 2**-9 of the sizes that are added."""
    world, rows, size = 4, [1024] * 4, 2048
    ranks = KernelRanks.virtual(world, timeout_s=KERNEL_TIMEOUT_S)
    matmuls = OverlappedMatmuls(ranks, rows, size, size, torch.bfloat16, num_pieces=2)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    xs = [draw(1024 if op == OPS[0] else 4096, size) for _ in range(world)]
    weights = [draw(size, size) for _ in range(world)]
    got = getattr(matmuls, op)(xs, weights, rows)
    matmuls.synchronize(30.0)
    if op == OPS[0]:
        wanted = [torch.cat(xs).double() @ weight.double().T for weight in weights]
        partial = [product.abs() for product in wanted]
    else:
        products = [x.double() @ weight.double().T for x, weight in zip(xs, weights, strict=True)]
        whole, sizes = sum(products), sum(product.abs() for product in products)
        wanted = list(whole.split(rows)) if op == OPS[1] else [whole] * world
        partial = list(sizes.split(rows)) if op == OPS[1] else [sizes] * world
    for one, other, size_of in zip(got, wanted, partial, strict=True):
        # Twice 2**-9 for the two roundings, and the fp32 accumulation over `size` products of about 1 below that.
        assert ((one.double() - other).abs() <= 2**-8 * size_of + size * 2**-20).all()


def test_a_rank_that_does_not_come_is_named_and_the_gpu_goes_on():
    both = KernelRanks.virtual(2, timeout_s=KERNEL_TIMEOUT_S)
    alone = KernelRanks(both.memory(1 << 20), both.device, [0], timeout_s=KERNEL_TIMEOUT_S)
    matmuls = OverlappedMatmuls(alone, [8, 8], IN, OUT, torch.float32)
    xs, weights, _ = tensors_of(OPS[0], [8, 8], torch.float32, 0)
    matmuls.all_gather_matmul(xs[:1], weights[:1], [8, 8])
    with pytest.raises(PeerTimeoutError, match=r"nothing came from rank\(s\) 1") as caught:
        matmuls.synchronize(0.5)
    assert caught.value.missing_ranks == [1]
    torch.cuda.synchronize()


def multiplies_over_processes(comm):
    ranks = KernelRanks.processes(comm, timeout_s=KERNEL_TIMEOUT_S)
    rows = uneven(comm.world_size, 1)
    matmuls = OverlappedMatmuls(ranks, [96] * comm.world_size, IN, OUT, torch.float32)
    right = []
    for seed, op in enumerate(OPS * 2):
        xs, weights, wanted = tensors_of(op, rows, torch.float32, seed)
        (got,) = getattr(matmuls, op)(xs[comm.rank : comm.rank + 1], weights[comm.rank : comm.rank + 1], rows)
        matmuls.synchronize(30.0)
        right.append(torch.equal(got, wanted[comm.rank]))
    return right


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_are_processes(pool, world):
    assert pool.run(world, multiplies_over_processes) == [[True] * 6] * world
