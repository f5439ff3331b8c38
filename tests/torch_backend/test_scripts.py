"""Scripts for torch.distributed, unchanged, on the back end and on gloo: the outcome is the same.

At two ranks it is the same bits: a sum of two numbers does not depend on their order, and dividing by two is exact. At
four, the back end adds in rank order and gloo in that of its ring, so sums of four numbers differ by up to
3 roundings each way, 6 x 2^-24 of the sum of magnitudes. All values here are below 8, a loss of three SGD steps at 0.1
feels a weight's change less than tenfold, and gradients are sums of at most 4 x 6 terms: 1e-5 bounds it all.
"""

import importlib.util

import pytest
import torch

from tests.torch_backend import scripts
from tests.torch_backend.helpers import run

FOUR_RANKS = 1e-5


def equal(ours, theirs, tolerance):
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape
        if tolerance:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(ours, theirs), (ours - theirs).abs().max()
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            equal(one, other, tolerance)
    else:
        assert ours == theirs


def compare(pool, world_size, script):
    theirs = run(pool, world_size, script, backend="gloo")
    ours = run(pool, world_size, script)
    equal(ours, theirs, 0.0 if world_size <= 2 else FOUR_RANKS)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "script",
    [scripts.ddp, scripts.fsdp2, scripts.checkpoint, scripts.tensor_parallel, scripts.pipeline, scripts.objects],
)
def test_same_as_gloo(pool, world_size, script):
    compare(pool, world_size, script)


def test_crossing_meshes(pool):
    compare(pool, 4, scripts.two_dimensions)


@pytest.mark.parametrize("world_size", [2, 3])
def test_overlapping_groups(pool, world_size):
    compare(pool, world_size, scripts.overlapping_groups)


@pytest.mark.parametrize("world_size", [2, 3])
def test_point_to_point(pool, world_size):
    compare(pool, world_size, scripts.point_to_point)


def test_compiled_functional_collectives(pool):
    run(pool, 2, scripts.compiled)


needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)


@needs_accelerate
def test_accelerate(pool):
    compare(pool, 2, scripts.accelerate)


@needs_accelerate
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_trainer(pool):
    compare(pool, 2, scripts.trainer)
