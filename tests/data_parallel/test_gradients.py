"""Averaged gradients: the right bits, whatever the settings, and the values of one process with the whole batch."""

import pytest
import torch
from torch import nn

from pycomm.data_parallel import DataParallel
from tests.data_parallel.helpers import (
    CONFIGS,
    HIDDEN,
    IN,
    OUT,
    ROWS,
    Recorder,
    batch,
    differing,
    expected,
    gradients,
    local_gradients,
    loss_of,
    mlp,
    rank_order_average,
    seeded,
)

WORLD_SIZES = (1, 2, 3, 4)
pytestmark = pytest.mark.parametrize("world_size", WORLD_SIZES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_are_the_rank_order_average_bit_for_bit_in_every_configuration(pool, world_size, dtype):
    assert pool.run(world_size, configurations_that_differ, dtype) == [[]] * world_size


def configurations_that_differ(comm, dtype):
    want = expected(comm.world_size, dtype=dtype)
    found = []
    for config in CONFIGS:
        ddp = DataParallel(mlp(dtype=dtype), comm, **config)
        assert (len(ddp.bucket_bytes) > 1) == (config["bucket_mb"] == 0.001)
        loss_of(ddp, comm.rank, dtype=dtype).backward()
        found += [(config, name) for name in differing(gradients(ddp.module), want)]
    return found


def test_gradients_of_an_mlp_are_those_of_one_process_with_the_whole_batch(pool, world_size):
    (result, *others) = pool.run(world_size, mlp_gradients)
    assert all(differing(other, result) == [] for other in others)
    model = mlp()
    x, target = (torch.cat(parts) for parts in zip(*(batch(rank) for rank in range(world_size)), strict=True))
    (((model(x) - target) ** 2).sum() / (2 * len(x))).backward()
    for (name, want), bound in zip(gradients(model).items(), mlp_bounds(model, x, target), strict=True):
        assert bool(((result[name] - want).abs() <= bound).all()), name
        assert bound.max() < 0.5 * want.abs().max()  # so that a sum does not pass for an average


def mlp_gradients(comm):
    ddp = DataParallel(mlp(), comm, bucket_mb=0.001)
    loss_of(ddp, comm.rank).backward()
    return gradients(ddp.module)


def mlp_bounds(model, x, target):
    """Bound per gradient element between two fp32 evaluations in different orders of summation, to first order in u.

    Replace each quantity by a majorant, computed in fp64 from absolute values: of a product the product, of a sum the
    sum, of tanh(z) that of z (|tanh z| <= |z|, slope <= 1), of its slope 1 - h * h, with h the majorant of tanh, 1 + h
    (slope <= 1, and an error e in h moves it by 2 |h| e <= 2 e). Then each rounding on the way moves the result by at
    most u times its majorant (twice that through a slope), u = 2**-24. On a path lie, with each sum of k terms
    counting k roundings: forward IN + 2 HIDDEN + 3 (biases), 3 tanh and slopes counted as 4 u each, backward
    OUT + HIDDEN + 2, the sum over all rows len(x), scaling and averaging 6. Errors of an activation enter a
    gradient through up to three factors. Two evaluations differ by twice the sum.
    """
    weights = [p.detach().double().abs() for p in model.parameters()]
    (w1, b1, w2, b2, w3, b3), x, target = weights, x.double().abs(), target.double().abs()
    h1 = x @ w1.T + b1
    h2 = h1 @ w2.T + b2
    d3 = (h2 @ w3.T + b3 + target) / len(x)
    d2 = d3 @ w3 * (1 + h2)
    d1 = d2 @ w2 * (1 + h1)
    majorants = [d1.T @ x, d1.sum(0), d2.T @ h1, d2.sum(0), d3.T @ h2, d3.sum(0)]
    roundings = 3 * (IN + 2 * HIDDEN + 3 + 12) + OUT + HIDDEN + 2 + len(x) + 6
    return [2 * 2 * roundings * 2**-24 * majorant for majorant in majorants]


class TwoDtypes(nn.Module):
    """bfloat16 between float32 layers, as in mixed-precision models: buckets of two dtypes get ready in turn."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.layers[2].bfloat16()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(getattr(layer, "weight", x).dtype))
        return x


def test_parameters_of_two_dtypes(pool, world_size):
    assert pool.run(world_size, differing_with_two_dtypes) == [[]] * world_size


def differing_with_two_dtypes(comm):
    want = [local_gradients(TwoDtypes(), rank) for rank in range(comm.world_size)]
    found = []
    for bucket_mb in (0.001, 25.0):
        ddp = DataParallel(TwoDtypes(), comm, bucket_mb=bucket_mb)
        assert len(ddp.bucket_bytes) >= 2
        loss_of(ddp, comm.rank).backward()
        got = gradients(ddp.module)
        found += differing(got, {name: rank_order_average([part[name] for part in want]) for name in got})
    return found


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_after_zero_grad(pool, world_size, set_to_none):
    assert pool.run(world_size, differing_after_zero_grad, set_to_none) == [[]] * world_size


def differing_after_zero_grad(comm, set_to_none):
    ddp = DataParallel(mlp(), comm, bucket_mb=0.001)
    for step in range(3):
        ddp.zero_grad(set_to_none=set_to_none)
        assert all(set_to_none == (p.grad is None) for p in ddp.parameters()) or step == 0
        loss_of(ddp, comm.rank, step).backward()
        got = gradients(ddp.module)
    return differing(got, expected(comm.world_size, (2,)))


def test_gradients_stay_views_of_the_buckets(pool, world_size):
    assert all(pool.run(world_size, gradient_memory_is_stable))


def gradient_memory_is_stable(comm):
    ddp = DataParallel(mlp(), comm)
    addresses = set()
    for set_to_none in (True, False, True):
        loss_of(ddp, comm.rank).backward()
        addresses.add(tuple(p.grad.data_ptr() for p in ddp.parameters()))
        ddp.zero_grad(set_to_none=set_to_none)
    return len(addresses) == 1


def test_a_second_backward_adds_the_average_of_the_new_gradients(pool, world_size):
    assert pool.run(world_size, differing_after_two_backwards) == [[]] * world_size


def differing_after_two_backwards(comm):
    ddp = DataParallel(mlp(), comm, bucket_mb=0.001)
    loss_of(ddp, comm.rank, 0).backward()
    loss_of(ddp, comm.rank, 1).backward()
    first = expected(comm.world_size, (0,))
    news = [local_gradients(mlp(), rank, (1,)) for rank in range(comm.world_size)]
    want = {name: rank_order_average([first[name] + new[name] for new in news]) for name in first}
    return differing(gradients(ddp.module), want)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_no_sync_accumulates_locally_and_the_next_backward_averages_all(pool, world_size, set_to_none):
    assert pool.run(world_size, differing_with_no_sync, set_to_none) == [([], [])] * world_size


def differing_with_no_sync(comm, set_to_none):
    events = []
    ddp = DataParallel(mlp(), Recorder(comm, events), bucket_mb=0.001)
    loss_of(ddp, comm.rank, 9).backward()
    ddp.zero_grad(set_to_none=set_to_none)
    events.clear()
    with ddp.no_sync():
        loss_of(ddp, comm.rank, 0).backward()
        with ddp.no_sync():
            loss_of(ddp, comm.rank, 1).backward()
        loss_of(ddp, comm.rank, 2).backward()
    assert events == []
    local = differing(gradients(ddp.module), local_gradients(mlp(), comm.rank, (0, 1, 2)))
    loss_of(ddp, comm.rank, 3).backward()
    assert [size for size, _ in events] == ddp.bucket_bytes
    return local, differing(gradients(ddp.module), expected(comm.world_size, (0, 1, 2, 3)))


def test_no_sync_ends_with_an_exception(pool, world_size):
    assert pool.run(world_size, differing_after_exception_in_no_sync) == [[]] * world_size


def differing_after_exception_in_no_sync(comm):
    ddp = DataParallel(mlp(), comm)
    try:
        with ddp.no_sync():
            loss_of(ddp, comm.rank, 0).backward()
            raise KeyError("planted")
    except KeyError:
        pass
    loss_of(ddp, comm.rank, 1).backward()
    return differing(gradients(ddp.module), expected(comm.world_size, (0, 1)))


def test_channels_last_parameters(pool, world_size):
    assert pool.run(world_size, differing_conv_gradients) == [[]] * world_size


def conv_gradients(model, rank):
    model.zero_grad()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(rank)).to(memory_format=torch.channels_last)
    model(x).square().sum().backward()
    return gradients(getattr(model, "module", model))


def conv_model():
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    return model.to(memory_format=torch.channels_last)


def differing_conv_gradients(comm):
    ddp = DataParallel(conv_model(), comm, bucket_mb=0.001)
    got = conv_gradients(ddp, comm.rank)
    assert all(p.grad.stride() == p.stride() for p in ddp.parameters())
    assert not ddp.module[0].weight.grad.is_contiguous()
    parts = [conv_gradients(conv_model(), rank) for rank in range(comm.world_size)]
    return differing(got, {name: rank_order_average([part[name] for part in parts]) for name in parts[0]})


def test_full_buckets_leave_in_order_before_backward_ends(pool, world_size):
    assert pool.run(world_size, events_of_backward, True) == [True] * world_size
    assert pool.run(world_size, events_of_backward, False) == [True] * world_size


def events_of_backward(comm, overlap):
    events = []
    ddp = DataParallel(mlp(), Recorder(comm, events), bucket_mb=0.001, overlap=overlap)
    x, _ = batch(comm.rank)
    # The gradient of the input is the last thing that autograd computes.
    x.requires_grad_().register_hook(lambda grad: events.append("end"))
    events.clear()
    ddp(x).square().sum().backward()
    launches = [(size, overlap) for size in ddp.bucket_bytes]
    assert len(launches) >= 3
    assert ddp.exposed_comm_s > 0
    # At least one bucket is underway while gradients are still computed.
    assert (events.index("end") > 0) == overlap
    events.remove("end")
    return events == launches


def test_rows_match_the_helpers(world_size):
    x, target = batch(world_size)
    assert (x.shape, target.shape) == ((ROWS, IN), (ROWS, OUT))
