"""DataParallel in loops of other kinds: compiled models, loss scaling, buffers, uneven batches, odd orders."""

import logging

import pytest
import torch
from torch import nn

import pycomm
from pycomm.data_parallel import DataParallel, ShardedAdamW
from pycomm.data_parallel.partial import AbsentGradient
from tests.data_parallel.helpers import (
    IN,
    Recorder,
    batch,
    bits,
    differing,
    expected,
    gradients,
    loss_of,
    message_of,
    mlp,
    rank_order_average,
    seeded,
)
from tests.data_parallel.training import train, weight_bits

every_world_size = pytest.mark.parametrize("world_size", [1, 2, 3, 4])


# Buckets in another order than the reverse of the model's


class Shuffled(nn.Module):
    """Layers go in an order of their own: gradients come in the opposite one."""

    def __init__(self, order):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(IN, IN) for _ in order)
        self.order = order

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x).tanh()
        return x


ORDERS = [(3, 1, 0, 2), (0, 1, 2, 3), (2, 3, 1, 0), (1, 0, 3, 2)]  # of the ranks: each has its own


def shuffled(rank):
    return seeded(Shuffled(ORDERS[rank]))


def shuffled_gradients(model, rank, step):
    model.zero_grad()
    model(batch(rank, step)[0]).square().sum().backward()
    return gradients(getattr(model, "module", model))


@every_world_size
def test_buckets_are_rebuilt_in_the_order_of_rank_0(pool, world_size):
    names = [f"layers.{index}.weight" for index in reversed(ORDERS[0])]
    assert pool.run(world_size, rebuilt_buckets) == [([], names)] * world_size


def rebuilt_buckets(comm):
    """Gradients that are not the averages, in the step that rebuilds buckets and after it; weights in bucket order."""
    events = []
    ddp = DataParallel(shuffled(comm.rank), Recorder(comm, events), bucket_mb=0.001)
    found = []
    for step in range(3):
        got = shuffled_gradients(ddp, comm.rank, step)
        parts = [shuffled_gradients(shuffled(rank), rank, step) for rank in range(comm.world_size)]
        found += differing(got, {name: rank_order_average([part[name] for part in parts]) for name in got})
    assert len(ddp.bucket_bytes) > 1
    in_order = [trained.name for bucket in ddp._engine.gradients.buckets for trained in bucket.params]
    return found, [name for name in in_order if name.endswith("weight")]


@every_world_size
def test_rebuilding_changes_no_bit_of_norms_and_weights(pool, world_size):
    for results in zip(*(pool.run(world_size, shuffled_training, stage) for stage in (0, 1, 2)), strict=True):
        assert results == (results[0],) * 3


def shuffled_training(comm, stage):
    ddp = DataParallel(shuffled(comm.rank), comm, bucket_mb=0.001)
    optimizer = ShardedAdamW(ddp, lr=0.01, stage=stage)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        ddp(batch(comm.rank, step)[0]).square().sum().backward()
        norms.append(bits(pycomm.clip_grad_norm_(ddp, 0.1)))
        optimizer.step()
    return norms, weight_bits(ddp)


# torch.compile


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_models(pool, outside):
    assert pool.run(2, differing_when_compiled, outside) == [([], True)] * 2


def differing_when_compiled(comm, outside):
    """The module is compiled, or the wrapper; aot_eager computes what eager does, with hooks on a compiled graph."""
    torch._dynamo.reset()
    events = []
    recorder = Recorder(comm, events)
    if outside:
        ddp = DataParallel(mlp(), recorder, bucket_mb=0.001)
        model = torch.compile(ddp, backend="aot_eager")
    else:
        model = ddp = DataParallel(torch.compile(mlp(), backend="aot_eager"), recorder, bucket_mb=0.001)
    found = []
    for step in range(2):
        ddp.zero_grad()
        events.clear()
        loss_of(model, comm.rank, step).backward()
        got = {name.removeprefix("_orig_mod."): grad for name, grad in gradients(ddp.module).items()}
        found += differing(got, expected(comm.world_size, (step,)))
    torch._dynamo.reset()
    return found, [size for size, _ in events] == ddp.bucket_bytes


# Loss scaling


@every_world_size
def test_grad_scaler_skips_on_all_ranks_and_unscales(pool, world_size):
    results = pool.run(world_size, scaled_training)
    assert results == [results[0]] * world_size
    scales, scaled, plain = results[0]
    assert scales == [1024.0, 512.0, 512.0]  # the second step overflowed on one rank
    assert scaled == plain  # powers of two: no rounding


def scaled_training(comm):
    """The weights with GradScaler, where a step overflows on the last rank, and without it and without that step."""
    scaled, plain = DataParallel(mlp(), comm), DataParallel(mlp(), comm)
    optimizers = [torch.optim.SGD(ddp.parameters(), lr=0.1) for ddp in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(3):
        optimizers[0].zero_grad()
        loss = loss_of(scaled, comm.rank, step)
        overflows = step == 1 and comm.rank == comm.world_size - 1
        scaler.scale(loss * float("inf") if overflows else loss).backward()
        scaler.unscale_(optimizers[0])
        pycomm.clip_grad_norm_(scaled, 1.0)
        scaler.step(optimizers[0])
        scaler.update()
        scales.append(scaler.get_scale())
        if step != 1:
            optimizers[1].zero_grad()
            loss_of(plain, comm.rank, step).backward()
            pycomm.clip_grad_norm_(plain, 1.0)
            optimizers[1].step()
    return scales, weight_bits(scaled), weight_bits(plain)


# Buffers


@every_world_size
@pytest.mark.parametrize("broadcast", [False, True])
def test_buffers(pool, world_size, broadcast):
    assert pool.run(world_size, differing_buffers, broadcast) == [[]] * world_size


def differing_buffers(comm, broadcast):
    """Batch norm's mean after each of: two forwards, one under no_sync(), one in evaluation."""

    def mean_after(old, rank, step):
        return old * 0.5 + batch(rank, step)[0].mean(0) * 0.5

    ddp = DataParallel(nn.BatchNorm1d(IN, momentum=0.5), comm, broadcast_buffers=broadcast)
    found = []

    def check(step, want):
        if not torch.allclose(ddp.module.running_mean, want, rtol=0, atol=1e-6):  # a few roundings of values below 4
            found.append(step)

    own = torch.zeros(IN)
    of_rank_0 = torch.zeros(IN)
    for step in range(2):
        ddp(batch(comm.rank, step)[0])
        own = mean_after(of_rank_0 if broadcast else own, comm.rank, step)
        of_rank_0 = mean_after(of_rank_0, 0, step)
        check(step, own)
    with ddp.no_sync():
        ddp(batch(comm.rank, 2)[0])
    own = mean_after(own, comm.rank, 2)
    check(2, own)
    ddp.eval()
    ddp(batch(comm.rank, 3)[0])
    check(3, own)
    return found


# Uneven batches


@every_world_size
def test_join_without_a_step_of_its_own(pool, world_size):
    """Rank r has r + 1 batches. Averages divide by all ranks; at the end everyone has what the last rank has."""
    want = weight_bits(joined_in_one_process(world_size))
    assert pool.run(world_size, join) == [(want, True)] * world_size


LR = 0.25


def join(comm):
    ddp = DataParallel(mlp(), comm, bucket_mb=0.001)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LR)
    with ddp.join():
        for step in range(comm.rank + 1):
            optimizer.zero_grad()
            loss_of(ddp, comm.rank, step).backward()
            optimizer.step()
    refused = DataParallel(mlp(), comm, broadcast_buffers=True)
    return weight_bits(ddp.module), "broadcast_buffers" in message_of(ValueError, refused.join().__enter__)


def joined_in_one_process(world_size):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(world_size):
        parts = []
        for rank in range(world_size):
            model.zero_grad()
            loss_of(model, rank, step).backward()
            zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            parts.append(gradients(model) if rank >= step else zeros)
        for name, param in model.named_parameters():
            param.grad = rank_order_average([part[name] for part in parts])
        optimizer.step()
    return model


# Accumulation with divided gradients


@pytest.mark.parametrize("world_size", [1, 2])
def test_stage_2_under_no_sync_keeps_whole_gradients_and_says_so_once(pool, world_size):
    warned, *others = pool.run(world_size, stage_2_under_no_sync)
    assert warned == (True, 1)
    assert others == [(True, 0)] * (world_size - 1)


def stage_2_under_no_sync(comm):
    """Whether the gradients are those of plain torch until the backward outside, which takes them; the warnings."""
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("pycomm").addHandler(handler)
    try:
        ddp, optimizer, _ = train(comm, 2, num_steps=0)
        model = ddp.module
        for _ in range(2):
            optimizer.zero_grad()
            with ddp.no_sync():
                ddp(torch.ones(1, 40)).sum().backward()
            whole = all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
            ddp(torch.ones(1, 40)).sum().backward()
            gone = all(p.grad is None or type(p.grad) is AbsentGradient for p in model.parameters())
            optimizer.step()
    finally:
        logging.getLogger("pycomm").removeHandler(handler)
    return whole and gone, sum("no_sync()" in text and "not divided" in text for text in warnings)
