"""Who shares a bucket, and where a parameter lies in it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pycomm.data_parallel.bucket import ALIGN_BYTES, build, dense_strides, plan

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
shapes = st.tuples(st.integers(0, 400), st.sampled_from(DTYPES))


def slot_bytes(param):
    return -(-param.numel() * param.element_size() // ALIGN_BYTES) * ALIGN_BYTES


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=20), st.sampled_from([64, 500, 1024, 10**6]))
def test_plan_keeps_its_rules(specs, cap):
    params = [torch.empty(numel, dtype=dtype) for numel, dtype in specs]
    groups = plan(params, cap)
    assert sorted(position for group in groups for position in group) == list(range(len(params)))
    for group in groups:
        assert len({params[position].dtype for position in group}) == 1
        assert group == sorted(group, reverse=True)
        assert len(group) == 1 or sum(slot_bytes(params[position]) for position in group) <= cap
    last_waited_for = [group[-1] for group in groups]
    assert last_waited_for == sorted(last_waited_for, reverse=True)


def test_plan_of_a_small_model():
    params = [
        torch.empty(n, dtype=dtype) for n, dtype in [(16, DTYPES[0]), (64, DTYPES[1]), (16, DTYPES[0]), (99, DTYPES[0])]
    ]
    # 64, 128, 64 and 396 (448 with padding) bytes; the float32 pair fits in 128, the last parameter is too large.
    assert plan(params, 128) == [[3], [1], [2, 0]]
    assert plan(params, 64) == [[3], [2], [1], [0]]
    assert plan(params, 10**6) == [[1], [3, 2, 0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_slots_are_aligned_disjoint_and_shaped_like_their_parameters(pool, symmetric):
    pool.run(1, check_slots, symmetric)


def check_slots(comm, symmetric):
    conv = nn.Parameter(torch.empty(3, 4, 5, 2).to(memory_format=torch.channels_last))
    sliced = nn.Parameter(torch.empty(6, 8)[:, ::2])
    named = [("conv", conv), ("empty", nn.Parameter(torch.empty(0, 3))), ("scalar", nn.Parameter(torch.empty(())))]
    buckets, status = build([*named, ("sliced", sliced)], comm, cap_bytes=10**6, symmetric=symmetric)
    (bucket,) = buckets
    assert torch.count_nonzero(bucket.flat) == 0
    for number, slot in enumerate(bucket.slots, 1):
        assert slot.view.shape == slot.param.shape
        assert slot.view.numel() == 0 or slot.view.data_ptr() % ALIGN_BYTES == 0
        slot.view.fill_(number)
    status.fill_(9)
    views = {slot.name: slot.view for slot in bucket.slots}
    assert views["conv"].stride() == conv.stride()
    assert views["sliced"].is_contiguous()  # the parameter has gaps; a bucket does not copy them
    sizes = {float(number): int((bucket.flat == number).sum()) for number in bucket.flat.unique() if number}
    assert sizes == {1.0: 24, 2.0: 1, 4.0: 120, 9.0: comm.world_size}


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
