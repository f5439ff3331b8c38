"""Every call of torch.distributed on the back end, at 1 to 4 ranks, against what it is defined to give."""

import functools
import itertools
import operator

import pytest
import torch
import torch.distributed as dist

from pycomm.errors import MismatchError
from tests.host.dtype_cases import REDUCED
from tests.torch_backend.helpers import run

SIZES = [1, 2, 3, 4]
MOVED = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.uint16, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


def ranks():
    return dist.get_rank(), dist.get_world_size()


def contribution(rank, shape=(2, 3), dtype=torch.float32):
    """Small whole numbers that differ by rank and place, so that sums are exact in every dtype."""
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 + rank
    return (numbers % 2 == 0) if dtype is torch.bool else numbers.to(dtype)


def strided(tensor):
    """The same values with strides that are not contiguous, where the shape allows."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2] if tensor.dim() else tensor


def same(tensor, expected):
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        tensor, expected = tensor.view(torch.uint8), expected.view(torch.uint8)
    assert tensor.dtype == expected.dtype
    assert torch.equal(tensor, expected), (tensor, expected)


def moves(dtype, layout):
    """Every call that only moves elements."""
    rank, n = ranks()
    make = functools.partial(contribution, dtype=dtype)
    mine, zeros = layout(make(rank)), lambda *shape: layout(torch.zeros(shape, dtype=dtype))
    everyone = [make(r) for r in range(n)]

    tensor = layout(make(rank))
    dist.broadcast(tensor, n - 1)
    same(tensor, everyone[n - 1])

    gathered = [zeros(2, 3) for _ in range(n)]
    dist.all_gather(gathered, mine)
    for tensor, expected in zip(gathered, everyone, strict=True):
        same(tensor, expected)

    for shape in ((2 * n, 3), (n, 2, 3)):  # concatenated and stacked
        joined = zeros(*shape)
        dist.all_gather_into_tensor(joined, mine)
        same(joined, torch.cat(everyone).reshape(shape))

    gathered = [zeros(2, 3) for _ in range(n)] if rank == 0 else None
    dist.gather(mine, gathered, dst=0)
    for tensor, expected in zip(gathered or [], everyone, strict=rank == 0):
        same(tensor, expected)

    tensor = zeros(2, 3)
    dist.scatter(tensor, [layout(part) for part in everyone] if rank == n - 1 else None, src=n - 1)
    same(tensor, everyone[rank])

    received = zeros(n, 3)
    dist.all_to_all_single(received, layout(make(rank, shape=(n, 3))))
    same(received, torch.stack([make(r, shape=(n, 3))[rank] for r in range(n)]))


@pytest.mark.parametrize("world_size", SIZES)
def test_calls_that_move(pool, world_size):
    run(pool, world_size, for_every_dtype_and_layout)


def for_every_dtype_and_layout():
    for dtype in MOVED:
        for layout in (torch.clone, strided):
            moves(dtype, layout)


def reductions():
    """all_reduce, reduce and reduce_scatter for every dtype and operator that has a meaning."""
    rank, n = ranks()
    op = dist.ReduceOp
    numbers = {
        op.SUM: lambda parts: functools.reduce(operator.add, parts),
        op.PRODUCT: lambda parts: functools.reduce(operator.mul, parts),
        op.MIN: lambda parts: functools.reduce(torch.minimum, parts),
        op.MAX: lambda parts: functools.reduce(torch.maximum, parts),
    }
    bits = {
        op.BAND: lambda parts: functools.reduce(operator.and_, parts),
        op.BOR: lambda parts: functools.reduce(operator.or_, parts),
        op.BXOR: lambda parts: functools.reduce(operator.xor, parts),
    }
    logic = {
        op.SUM: bits[op.BOR], op.PRODUCT: bits[op.BAND], op.MIN: bits[op.BAND], op.MAX: bits[op.BOR],
        op.BAND: bits[op.BAND], op.BOR: bits[op.BOR], op.BXOR: bits[op.BXOR],
    }  # fmt: skip
    by_dtype = {torch.bool: logic, torch.complex64: {op.SUM: numbers[op.SUM]}}
    by_dtype |= dict.fromkeys((torch.float32, torch.float64, torch.float16, torch.bfloat16), numbers)
    by_dtype |= dict.fromkeys((torch.int8, torch.uint8, torch.int32, torch.int64), numbers | bits)
    for dtype, operators in by_dtype.items():
        for name, reference in operators.items():
            everyone = [contribution(r, (n, 3), dtype) for r in range(n)]
            expected = reference(everyone)
            for layout in (torch.clone, strided):
                tensor = layout(everyone[rank])
                dist.all_reduce(tensor, name)
                same(tensor, expected)
                tensor = layout(everyone[rank])
                dist.reduce(tensor, n - 1, name)
                same(tensor, expected if rank == n - 1 else everyone[rank])
                if (name in bits and dtype is not torch.bool) or name == op.BXOR:
                    continue
                for single in (True, False):
                    part = layout(torch.zeros(1, 3, dtype=dtype))
                    if single:
                        dist.reduce_scatter_tensor(part, layout(everyone[rank]), name)
                    else:
                        dist.reduce_scatter(part, list(layout(everyone[rank]).split(1)), name)
                    same(part, expected[rank : rank + 1])


@pytest.mark.parametrize("world_size", SIZES)
def test_reductions(pool, world_size):
    run(pool, world_size, reductions)


def averages_and_factors():
    rank, n = ranks()
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        tensor = torch.full((4,), 2.0 * rank, dtype=dtype)
        dist.all_reduce(tensor, dist.ReduceOp.AVG)
        same(tensor, torch.full((4,), n - 1.0, dtype=dtype))  # the mean of 0, 2, …, 2(n-1)
    for factor in (0.5, torch.tensor(0.5)):
        tensor = torch.full((n, 4), 2.0 * rank)
        kept = tensor.clone()
        part = torch.zeros(1, 4)
        dist.reduce_scatter_tensor(part, tensor, dist.ReduceOp.PREMUL_SUM(factor))
        same(part, torch.full((1, 4), n * (n - 1) / 2))
        same(tensor, kept)
        dist.all_reduce(tensor, dist.ReduceOp.PREMUL_SUM(factor))
        same(tensor, torch.full((n, 4), n * (n - 1) / 2))


@pytest.mark.parametrize("world_size", SIZES)
def test_averages_and_premultiplied_sums(pool, world_size):
    run(pool, world_size, averages_and_factors)


def uneven():
    """Lists whose tensors differ in size from rank to rank, empty ones among them."""
    rank, n = ranks()
    gathered = [torch.zeros(r, 2) for r in range(n)]
    dist.all_gather(gathered, torch.full((rank, 2), float(rank)))
    for r, tensor in enumerate(gathered):
        same(tensor, torch.full((r, 2), float(r)))

    part = torch.zeros(rank + 1)
    dist.reduce_scatter(part, [torch.full((r + 1,), float(rank)) for r in range(n)])
    same(part, torch.full((rank + 1,), n * (n - 1) / 2))

    received = [torch.zeros(rank + 1, dtype=torch.int64) for _ in range(n)]
    dist.all_to_all(received, [torch.full((d + 1,), 10 * rank + d) for d in range(n)])
    for s, tensor in enumerate(received):
        same(tensor, torch.full((rank + 1,), 10 * s + rank))

    sizes = [[(s + d) % 3 for d in range(n)] for s in range(n)]  # rows from s to d
    output = torch.zeros(sum(sizes[s][rank] for s in range(n)), 2)
    source = torch.full((sum(sizes[rank]), 2), float(rank))
    dist.all_to_all_single(output, source, [sizes[s][rank] for s in range(n)], sizes[rank])
    same(output, torch.cat([torch.full((sizes[s][rank], 2), float(s)) for s in range(n)]))


@pytest.mark.parametrize("world_size", SIZES)
def test_uneven_parts(pool, world_size):
    run(pool, world_size, uneven)


def coalesced():
    rank, n = ranks()
    device = torch.device("cpu")
    tensors = [torch.full((size,), float(rank)) for size in (1, 5)]
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    for tensor in tensors:
        assert tensor.eq(n * (n - 1) / 2).all()
    outputs = [torch.zeros(n, size) for size in (1, 5)]
    parts = [torch.zeros(1, size) for size in (1, 5)]
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:
        for output in outputs:
            dist.all_gather_into_tensor(output, torch.full((1, output.shape[1]), float(rank)))
    manager.wait()
    with dist.distributed_c10d._coalescing_manager():
        for part, output in zip(parts, outputs, strict=True):
            dist.reduce_scatter_tensor(part, output)
    for part in parts:
        assert part.eq(n * rank).all()
    received = [torch.zeros(2), torch.zeros(3)]
    with dist.distributed_c10d._coalescing_manager(device=device, async_ops=True) as manager:
        for tag, tensor in enumerate(received):
            dist.isend(torch.full_like(tensor, rank + tag), (rank + 1) % n, tag=tag)
            dist.irecv(tensor, (rank - 1) % n, tag=tag)
    manager.wait()
    for tag, tensor in enumerate(received):
        assert tensor.eq((rank - 1) % n + tag).all()


@pytest.mark.parametrize("world_size", SIZES)
def test_coalesced_calls(pool, world_size):
    run(pool, world_size, coalesced)


def methods():
    """The names that torch calls on the group itself: both families, with and without options."""
    group = dist.group.WORLD
    rank, n = ranks()
    everyone = torch.arange(n, dtype=torch.float32)
    mine = torch.full((1,), float(rank))
    for name in ("all_gather_single", "_allgather_base"):
        output = torch.zeros(n)
        getattr(group, name)(output, mine).wait()
        same(output, everyone)
    for name in ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"):
        output = torch.zeros(n)
        getattr(group, name)([output], [mine]).wait()
        same(output, everyone)
    for name in ("reduce_scatter_single", "_reduce_scatter_base"):
        output = torch.zeros(1)
        getattr(group, name)(output, everyone).wait()
        same(output, n * mine)
    for name in ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"):
        output = torch.zeros(1)
        getattr(group, name)([output], [everyone]).wait()
        same(output, n * mine)
    for name in ("all_to_all_single", "alltoall_base"):
        output = torch.zeros(n)
        getattr(group, name)(output, everyone, [], []).wait()
        same(output, mine.expand(n))
    outputs = [[torch.zeros(1)] for _ in range(n)]
    group.allgather_coalesced(outputs, [mine]).wait()
    same(torch.cat([tensor for (tensor,) in outputs]), everyone)
    group.barrier().wait()
    assert (group.rank(), group.size(), group.name(), dist.get_backend(group)) == (rank, n, "pycomm", "pycomm")
    assert group.group_name
    assert dist.distributed_c10d._resolve_process_group(group.group_name) is group


@pytest.mark.parametrize("world_size", [1, 3])
def test_method_families(pool, world_size):
    run(pool, world_size, methods)


def calls_of(whole, part):
    """What two ranks call on these tensors; rank 0's send is small, so it has returned when the receiver comes."""
    rank = dist.get_rank()
    if rank == 0:
        dist.send(whole, 1)
    receives = [] if rank == 0 else [lambda: dist.recv(whole, 0)]
    return [
        *receives,
        lambda: dist.broadcast(whole, 0),
        lambda: dist.all_gather_into_tensor(whole, part),
        lambda: dist.all_gather([part, part.clone()], part),
        lambda: dist.all_to_all_single(whole, whole.clone()),
        lambda: dist.gather(part, [part.clone(), part.clone()] if rank == 0 else None),
        lambda: dist.scatter(part, [part.clone(), part.clone()] if rank == 0 else None),
    ], [
        lambda: dist.all_reduce(whole),
        lambda: dist.reduce(whole, 1),
        lambda: dist.reduce_scatter_tensor(part, whole),
        lambda: dist.reduce_scatter(part, [part.clone(), part.clone()]),
    ]


def foreign_dtypes():
    """Rank 0 calls with one dtype, rank 1 with another of equally many bytes: nothing is taken for anything else."""
    rank, said = dist.get_rank(), []
    pairs = [
        (torch.int16, torch.bool), (torch.complex64, torch.float32), (torch.float8_e4m3fn, torch.uint8),
        (torch.bool, torch.uint8), (torch.complex64, torch.float64), (torch.uint64, torch.float64),
        (torch.float8_e4m3fn, torch.float8_e5m2), (torch.uint64, torch.int64),
    ]  # fmt: skip
    for pair, layout in itertools.product(pairs, (torch.clone, strided)):  # as it is, and through other memory
        whole, part = (layout(torch.ones(size, dtype=torch.uint8).view(pair[rank])) for size in (32, 16))
        moving, reducing = calls_of(whole, part)
        for call in moving + (reducing if all(each in REDUCED for each in pair) else []):
            with pytest.raises(MismatchError) as raised:
                call()
            said.append(raised.value.calls[rank])
            assert str(pair[rank]).removeprefix("torch.") in said[-1]
            for tensor in (whole, part):
                assert tensor.contiguous().view(torch.uint8).eq(1).all()
    dist.barrier()
    return said


def test_no_dtype_passes_for_another(pool):
    """Catches dtypes that travel as bytes or pairs and are taken for those."""
    said = run(pool, 2, foreign_dtypes)[0]
    assert "broadcast(root=0, int16[16])" in said
    assert "all_reduce(sum, complex64[4])" in said


def refusals():
    group = dist.group.WORLD
    said = {}

    def attempt(name, function, *args):
        try:
            function(*args)
        except (ValueError, RuntimeError) as error:
            said[name] = (type(error).__name__, str(error))

    attempt("sparse", dist.all_reduce, torch.eye(3).to_sparse())
    attempt("meta", dist.all_reduce, torch.zeros(3, device="meta"))
    attempt("int16", dist.all_reduce, torch.zeros(3, dtype=torch.int16))
    attempt("average of integers", dist.all_reduce, torch.zeros(3, dtype=torch.int64), dist.ReduceOp.AVG)
    attempt("bits of floats", dist.all_reduce, torch.zeros(3), dist.ReduceOp.BXOR)
    attempt("monitored", dist.monitored_barrier)
    attempt("monitored on the group", group.monitored_barrier)
    attempt("several", group.allreduce, [torch.zeros(1), torch.zeros(1)])
    dist.barrier()  # none of them sent anything
    return said


def test_refusals_say_why(pool):
    for said in run(pool, 2, refusals):
        assert {name: kind for name, (kind, _) in said.items()} == {
            "sparse": "ValueError",
            "meta": "BackendUnavailableError",
            "int16": "ValueError",
            "average of integers": "ValueError",
            "bits of floats": "ValueError",
            "monitored": "ValueError",
            "monitored on the group": "NotImplementedError",
            "several": "ValueError",
        }
        assert "to_dense()" in said["sparse"][1]
        assert "NCCL" in said["meta"][1]
        assert "barrier()" in said["monitored on the group"][1]
