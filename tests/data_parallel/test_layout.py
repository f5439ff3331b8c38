"""Who shares a bucket, where a parameter lies in it, and who owns which of its elements."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pycomm.data_parallel.flat import FlatGradients
from pycomm.data_parallel.gradients import Options
from pycomm.data_parallel.layout import ALIGN_BYTES, NORM_BLOCK, dense_strides, lay_out, owned, plan
from pycomm.data_parallel.pooled import messages_of
from pycomm.data_parallel.step import Step

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
shapes = st.tuples(st.integers(0, 400), st.sampled_from(DTYPES))


def params_of(params, rank=0, world_size=1):
    named = [(str(number), nn.Parameter(param), param.dtype) for number, param in enumerate(params)]
    return lay_out(named, rank, world_size)


def padded_bytes(param):
    return -(-param.numel() * param.element_size() // ALIGN_BYTES) * ALIGN_BYTES


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=20), st.sampled_from([64, 500, 1024, 10**6]), st.randoms())
def test_plan_keeps_its_rules(specs, cap, random):
    params = params_of([torch.empty(numel, dtype=dtype) for numel, dtype in specs])
    random.shuffle(params)
    buckets = plan(params, cap)
    assert sorted(param.index for bucket in buckets for param in bucket.params) == list(range(len(params)))
    position = {param: number for number, param in enumerate(params)}
    for number, bucket in enumerate(buckets):
        assert len({param.param.dtype for param in bucket.params}) == 1
        assert [position[param] for param in bucket.params] == sorted(position[param] for param in bucket.params)
        assert bucket.num_bytes == sum(padded_bytes(param.param) for param in bucket.params)
        assert len(bucket.params) == 1 or bucket.num_bytes <= cap
        assert {param.bucket_index for param in bucket.params} == {number}
    last_waited_for = [position[bucket.params[-1]] for bucket in buckets]
    assert last_waited_for == sorted(last_waited_for)


def test_plan_of_a_small_model():
    params = params_of(
        [torch.empty(n, dtype=dtype) for n, dtype in zip((16, 64, 16, 99), [*DTYPES[:2], *DTYPES[:1] * 2], strict=True)]
    )[::-1]
    # 64, 128, 64 and 396 (448 with padding) bytes; the float32 pair fits in 128, the last parameter is too large.
    for cap, want in [(128, [[3], [1], [2, 0]]), (64, [[3], [2], [1], [0]]), (10**6, [[1], [3, 2, 0]])]:
        assert [[param.index for param in bucket.params] for bucket in plan(params, cap)] == want


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
def test_messages_carry_every_element_once_and_their_runs_are_the_shards(numels, capacity, world_size):
    found = []
    for rank in range(world_size):
        params = params_of([torch.empty(numel) for numel in numels], rank, world_size)
        (bucket,) = plan(params, 10**9)
        messages = messages_of(bucket, capacity)
        assert all(message.numel <= capacity for message in messages)
        pieces = [piece for message in messages for piece in message.pieces]
        assert all(elements.start % NORM_BLOCK == 0 for _, elements, _ in pieces)
        carried = [(p.index, at) for p, elements, _ in pieces for at in range(elements.start, elements.stop)]
        assert carried == [(param.index, at) for param in params for at in range(param.param.numel())]
        runs = [(message, run) for message in messages for run in message.runs() if run.numel > 0]
        packed = [at for _, run in runs for at in range(run.packed, run.packed + run.numel)]
        assert sorted(packed) == list(range(params[0].family.num_owned))
        for message, run in runs:
            param, elements, start = [piece for piece in message.pieces if piece[2] <= run.grad][-1]
            begin = elements.start + run.grad - start
            assert begin + run.numel <= elements.stop
            assert run.first_block == param.first_block + begin // NORM_BLOCK
            found += [(param.index, at) for at in range(begin, begin + run.numel)]
    assert sorted(found) == [(index, at) for index, numel in enumerate(numels) for at in range(numel)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_aligned_disjoint_and_shaped_like_their_parameters(pool, symmetric):
    pool.run(1, check_places, symmetric)


def check_places(comm, symmetric):
    conv = nn.Parameter(torch.empty(3, 4, 5, 2).to(memory_format=torch.channels_last))
    sliced = nn.Parameter(torch.empty(6, 8)[:, ::2])
    shapes = {"conv": conv, "empty": nn.Parameter(torch.empty(0, 3)), "scalar": nn.Parameter(torch.empty(()))}
    named = [(name, param, param.dtype) for name, param in (*shapes.items(), ("sliced", sliced))]
    params = lay_out(named, comm.rank, comm.world_size)
    gradients = FlatGradients(params, comm, Options(10**6, False, symmetric), Step())
    (flat,) = gradients.buffers.values()
    assert torch.count_nonzero(flat) == 0
    for number, param in enumerate(params, 1):
        assert param.view.shape == param.param.shape
        assert param.view.numel() == 0 or param.view.data_ptr() % ALIGN_BYTES == 0
        param.view.fill_(number)
    views = {param.name: param.view for param in params}
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
