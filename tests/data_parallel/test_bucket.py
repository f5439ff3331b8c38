"""Who shares a bucket, where a parameter lies in it, and who owns which of its elements."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pycomm.data_parallel.bucket import ALIGN_BYTES, dense_strides, make_slots, plan
from pycomm.data_parallel.flat import FlatGradients
from pycomm.data_parallel.gradients import Options
from pycomm.data_parallel.pooled import loads_of
from pycomm.data_parallel.shards import NORM_BLOCK, owned

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
shapes = st.tuples(st.integers(0, 400), st.sampled_from(DTYPES))


def slots_of(params, rank=0, world_size=1):
    named = [(str(number), nn.Parameter(param), param.dtype) for number, param in enumerate(params)]
    return make_slots(named, rank, world_size)[0]


def slot_bytes(param):
    return -(-param.numel() * param.element_size() // ALIGN_BYTES) * ALIGN_BYTES


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=20), st.sampled_from([64, 500, 1024, 10**6]), st.randoms())
def test_plan_keeps_its_rules(specs, cap, random):
    slots = slots_of([torch.empty(numel, dtype=dtype) for numel, dtype in specs])
    random.shuffle(slots)
    buckets = plan(slots, cap)
    assert sorted(slot.index for bucket in buckets for slot in bucket.slots) == list(range(len(slots)))
    position = {slot: number for number, slot in enumerate(slots)}
    for number, bucket in enumerate(buckets):
        assert len({slot.param.dtype for slot in bucket.slots}) == 1
        assert [position[slot] for slot in bucket.slots] == sorted(position[slot] for slot in bucket.slots)
        assert bucket.num_bytes == sum(slot_bytes(slot.param) for slot in bucket.slots)
        assert len(bucket.slots) == 1 or bucket.num_bytes <= cap
        assert {slot.bucket_index for slot in bucket.slots} == {number}
    last_waited_for = [position[bucket.slots[-1]] for bucket in buckets]
    assert last_waited_for == sorted(last_waited_for)


def test_plan_of_a_small_model():
    slots = slots_of(
        [torch.empty(n, dtype=dtype) for n, dtype in zip((16, 64, 16, 99), [*DTYPES[:2], *DTYPES[:1] * 2], strict=True)]
    )[::-1]
    # 64, 128, 64 and 396 (448 with padding) bytes; the float32 pair fits in 128, the last parameter is too large.
    for cap, want in [(128, [[3], [1], [2, 0]]), (64, [[3], [2], [1], [0]]), (10**6, [[1], [3, 2, 0]])]:
        assert [[slot.index for slot in bucket.slots] for bucket in plan(slots, cap)] == want


@given(st.integers(0, 20_000), st.integers(0, 9), st.integers(1, 7))
def test_ranks_own_whole_blocks_and_everything_once(numel, index, world_size):
    ranges = sorted(owned(numel, index, rank, world_size) for rank in range(world_size))
    assert all(begin <= end for begin, end in ranges)
    elements = [element for begin, end in ranges for element in range(begin, end)]
    assert elements == list(range(numel))
    assert all(begin % NORM_BLOCK == 0 or begin == numel for begin, _ in ranges)
    sizes = [end - begin for begin, end in ranges]
    assert max(sizes) - min(sizes) <= NORM_BLOCK


@given(
    st.lists(st.integers(0, 9000), min_size=1, max_size=6), st.integers(NORM_BLOCK, 5 * NORM_BLOCK), st.integers(1, 4)
)
def test_loads_carry_every_element_once_and_their_runs_are_the_shards(numels, capacity, world_size):
    found = []
    for rank in range(world_size):
        slots = slots_of([torch.empty(numel) for numel in numels], rank, world_size)
        (bucket,) = plan(slots, 10**9)
        loads = loads_of(bucket, capacity)
        assert all(load.numel <= capacity for load in loads)
        pieces = [piece for load in loads for piece in load.pieces]
        assert all(piece.begin % NORM_BLOCK == 0 for piece in pieces)
        carried = [(piece.slot.index, at) for piece in pieces for at in range(piece.begin, piece.end)]
        assert carried == [(slot.index, at) for slot in slots for at in range(slot.param.numel())]
        packed = [at for load in loads for _, _, at, count, _, _ in load.rows for at in range(at, at + count)]
        assert sorted(packed) == list(range(slots[0].family.num_owned))
        for load in loads:
            for grad, _, _, count, block, _ in load.rows:
                piece = next(p for p in load.pieces if p.start <= grad < p.start + p.end - p.begin)
                begin = piece.begin + grad - piece.start
                assert block == piece.slot.first_block + begin // NORM_BLOCK
                found += [(piece.slot.index, at) for at in range(begin, begin + count)]
    assert sorted(found) == [(index, at) for index, numel in enumerate(numels) for at in range(numel)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_slots_are_aligned_disjoint_and_shaped_like_their_parameters(pool, symmetric):
    pool.run(1, check_slots, symmetric)


def check_slots(comm, symmetric):
    conv = nn.Parameter(torch.empty(3, 4, 5, 2).to(memory_format=torch.channels_last))
    sliced = nn.Parameter(torch.empty(6, 8)[:, ::2])
    params = {"conv": conv, "empty": nn.Parameter(torch.empty(0, 3)), "scalar": nn.Parameter(torch.empty(()))}
    named = [(name, param, param.dtype) for name, param in (*params.items(), ("sliced", sliced))]
    slots, families = make_slots(named, comm.rank, comm.world_size)
    gradients = FlatGradients(slots, families, comm, Options(10**6, False, symmetric))
    (flat,) = gradients.flats.values()
    assert torch.count_nonzero(flat) == 0
    for number, slot in enumerate(slots, 1):
        assert slot.view.shape == slot.param.shape
        assert slot.view.numel() == 0 or slot.view.data_ptr() % ALIGN_BYTES == 0
        slot.view.fill_(number)
    views = {slot.name: slot.view for slot in slots}
    assert views["conv"].stride() == conv.stride()
    assert views["sliced"].is_contiguous()  # the parameter has gaps; a bucket does not copy them
    sizes = {float(number): int((flat == number).sum()) for number in flat.unique() if number}
    assert sizes == {1.0: 120, 3.0: 1, 4.0: 24}


@pytest.mark.parametrize(
    ("tensor", "strides"),
    [
        (torch.empty(2, 3, 4, 5), (60, 20, 5, 1)),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), (60, 1, 15, 3)),
        (torch.empty(5, 4).t(), (1, 4)),
        (torch.empty(3, 8)[:, ::2], (4, 1)),
        (torch.empty(3, 1).expand(3, 4), (4, 1)),
        (torch.empty(()), ()),
    ],
)
def test_dense_strides(tensor, strides):
    assert dense_strides(tensor) == strides
