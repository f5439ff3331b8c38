"""The kernels of virtual ranks on a GPU against the host transport, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pycomm.errors import PeerLostError, PeerTimeoutError
from pycomm.gpu import KernelRanks
from pycomm.gpu.memory import tensors_of
from tests.cuda_on_cpu.test_collectives import CHUNK, assert_same_bits, host_reduced, squares_of
from tests.gpu.helpers import KERNEL_TIMEOUT_S, from_gpu, to_gpu
from tests.host.reduce_reference import CASES, narrow, some_sources, widen

WORLDS = [1, 2, 3, 4, 8]
COUNTS = [1, 13, 1027, 300 * CHUNK + 9]


@pytest.fixture(scope="module")
def groups() -> dict[int, KernelRanks]:
    return {world: KernelRanks.virtual(world, timeout_s=KERNEL_TIMEOUT_S) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("dtype", "op"), CASES)
def test_all_reduce(groups, world, dtype, op):
    ranks = groups[world]
    for seed, count in enumerate(COUNTS):
        sources = some_sources(dtype, world, count, seed)
        wanted = host_reduced(dtype, op, sources)
        two_shot = [to_gpu(dtype, raw) for raw in sources]
        one_shot = [to_gpu(dtype, raw) for raw in sources]
        ranks.all_reduce(two_shot, op)
        ranks.all_reduce_one_shot(one_shot, one_shot, op)
        ranks.synchronize()
        for tensor in (*two_shot, *one_shot):
            assert_same_bits(from_gpu(dtype, tensor), wanted)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("dtype", "op"), CASES)
def test_reduce_scatter_and_all_gather(groups, world, dtype, op):
    ranks, count = groups[world], world * (CHUNK + 13)
    sources = some_sources(dtype, world, count, 1)
    inputs = [to_gpu(dtype, raw) for raw in sources]
    parts = [torch.empty_like(inputs[0][: count // world]) for _ in range(world)]
    outputs = [torch.empty_like(inputs[0]) for _ in range(world)]
    ranks.reduce_scatter(parts, inputs, op)
    ranks.all_gather(outputs, parts)
    ranks.synchronize()
    wanted = host_reduced(dtype, op, sources)
    for output in outputs:
        assert_same_bits(from_gpu(dtype, output), wanted)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_sixteen_bits_on_the_wire_and_float32_sums(groups, world, wire):
    ranks, count = groups[world], world * CHUNK
    sources = some_sources("float32", world, count, 3)
    with np.errstate(over="ignore"):
        cast = [narrow(wire, raw) for raw in sources]
    wanted = host_reduced("float32", "avg", [widen(wire, raw).copy() for raw in cast])
    wanted = np.where(np.isnan(wanted), np.float32(np.nan), wanted)
    tensors = [to_gpu("float32", raw) for raw in sources]
    ranks.all_reduce_one_shot(tensors, tensors, "avg", wire_dtype=getattr(torch, wire))
    inputs = [to_gpu(wire, raw) for raw in cast]
    parts = [torch.empty(CHUNK, device="cuda") for _ in range(world)]
    ranks.reduce_scatter(parts, inputs, "avg")
    ranks.synchronize()
    assert_same_bits(from_gpu("float32", tensors[-1]), wanted)
    assert_same_bits(from_gpu("float32", torch.cat(parts)), wanted)


def test_squares_are_the_same_on_every_rank(groups):
    world, count = 4, 4 * 3 * CHUNK
    ranks = groups[world]
    sources = [np.random.default_rng(rank).standard_normal(count).astype(np.float32) for rank in range(world)]
    reduced = host_reduced("float32", "avg", sources)
    wanted = [squares_of("float32", reduced[at : at + CHUNK]) for at in range(0, count, CHUNK)]
    squares, scattered = (
        [torch.zeros(count // CHUNK, dtype=torch.float64, device="cuda") for _ in range(world)] for _ in range(2)
    )
    inputs = [to_gpu("float32", raw) for raw in sources]
    parts = [torch.empty(count // world, device="cuda") for _ in range(world)]
    ranks.reduce_scatter(parts, inputs, "avg", squares=scattered)
    ranks.all_reduce(inputs, "avg", squares=squares)
    ranks.synchronize()
    for got in (*squares, *scattered):
        np.testing.assert_array_equal(got.cpu().numpy(), wanted)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("num_slots", [1, 4])
def test_messages_go_round(groups, world, num_slots):
    ranks, count = groups[world], 100_003
    inputs = [torch.arange(count, device="cuda", dtype=torch.int32) + rank for rank in range(world)]
    outputs = [torch.empty_like(tensor) for tensor in inputs]
    slots = [torch.empty(num_slots, 4 * count + 64, dtype=torch.uint8, device="cuda") for _ in range(world)]
    for _ in range(world):
        ranks.shift(outputs, inputs, slots)
        ranks.shift(inputs, outputs, slots)
    ranks.synchronize()
    shift = 2 * world % world
    for rank, tensor in enumerate(inputs):
        assert torch.equal(tensor, torch.arange(count, device="cuda", dtype=torch.int32) + (rank - shift) % world)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_calls_in_a_graph_can_be_replayed(groups, world):
    ranks = groups[world]
    small = [torch.full((2048,), float(rank + 1), device="cuda") for rank in range(world)]
    large = [torch.full((70_000,), 1.0, device="cuda") for _ in range(world)]

    def calls() -> None:
        ranks.all_reduce_one_shot(small, small, "max")
        ranks.all_reduce(large)

    calls()
    ranks.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    ranks.synchronize()
    assert all(tensor.eq(world).all() for tensor in small)
    assert all(tensor.eq(float(world) ** 4).all() for tensor in large)


def test_a_rank_that_is_not_there_is_named_and_the_gpu_goes_on():
    whole = KernelRanks.virtual(3, timeout_s=0.2)
    pads = whole.memory(1 << 20)
    ranks = KernelRanks(pads, whole.device, [0, 2], timeout_s=0.2)
    tensors = [torch.ones(1000, device="cuda") for _ in range(3)]
    ranks.all_reduce(tensors)
    with pytest.raises(PeerTimeoutError, match="waited for rank 1") as caught:
        ranks.synchronize()
    assert caught.value.missing_ranks == [1]
    assert all(tensor.eq(1).all() for tensor in tensors)
    whole.all_reduce(tensors)
    whole.synchronize()
    assert all(tensor.eq(3).all() for tensor in tensors)


def test_an_aborted_group_does_nothing():
    ranks = KernelRanks.virtual(2, timeout_s=KERNEL_TIMEOUT_S)
    tensors = [torch.ones(1000, device="cuda") for _ in range(2)]
    ranks.abort()
    torch.cuda.synchronize()
    ranks.all_reduce(tensors)
    with pytest.raises(PeerLostError, match="aborted"):
        ranks.synchronize()
    assert all(tensor.eq(1).all() for tensor in tensors)


def test_blocks_that_cannot_all_be_resident_are_refused(groups):
    tensors = [torch.ones(1 << 20, device="cuda") for _ in range(8)]
    with pytest.raises(ValueError, match="8 kernels of 128 blocks wait for each other on this GPU"):
        groups[8].all_reduce(tensors, num_blocks=128)
    torch.cuda.synchronize()


def test_symmetric_tensors_are_zero_and_apart(groups):
    tensors = groups[4].empty(1000, dtype=torch.bfloat16)
    for rank, tensor in enumerate(tensors):
        assert tensor.eq(0).all()
        tensor.fill_(rank)
    assert [int(tensor[0]) for tensor in tensors] == [0, 1, 2, 3]


def reduces_over_processes(comm):
    ranks = KernelRanks.processes(comm, timeout_s=KERNEL_TIMEOUT_S)
    tensors = ranks.empty(200_003)
    outputs = ranks.empty(comm.world_size * 1000, dtype=torch.int64)
    tensors[comm.rank].fill_(comm.rank + 1.0)
    for _ in range(3):
        ranks.all_reduce(tensors)
    ranks.all_gather(outputs, [torch.full((1000,), comm.rank, device="cuda")])
    small = torch.full((500,), comm.rank + 1.0, device="cuda")
    ranks.all_reduce_one_shot([small], [small])
    ranks.synchronize()
    gathered = outputs[comm.rank].view(comm.world_size, 1000)
    return tensors[comm.rank].unique().tolist(), [row.unique().tolist() for row in gathered], small.unique().tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_memory_by_handles(pool, world):
    total = sum(range(1, world + 1))
    expected = ([float(total * world**2)], [[rank] for rank in range(world)], [float(total)])
    assert pool.run(world, reduces_over_processes) == [expected] * world


def test_memory_of_a_group_is_seen_through_any_tensor_of_it(groups):
    memory = groups[2].memory(4096)
    first = tensors_of(memory, groups[2].device, (1024,), torch.float32)
    again = tensors_of(memory, groups[2].device, (512,), torch.float32, offset=2048)
    first[1][512:].fill_(7)
    assert again[1].eq(7).all()
    assert again[0].eq(0).all()
