"""ShardedAdamW: the same weights in every stage and configuration, and torch's within rounding."""

import itertools

import pytest
import torch
from torch import nn

import pycomm
from pycomm.data_parallel import DataParallel, ShardedAdamW
from pycomm.data_parallel.partial import AbsentGradient
from pycomm.errors import MismatchError, PycommError
from tests.data_parallel.helpers import bits, loss_of, message_of, mlp
from tests.data_parallel.training import (
    MAX_NORM,
    NUM_STEPS,
    loss_on,
    network,
    train,
    weight_bits,
)

WORLD_SIZES = (1, 2, 3, 4)
every_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)
STAGES = (0, 1, 2)
every_stage = pytest.mark.parametrize("stage", STAGES)


@pytest.mark.parametrize(("world_size", "sizes"), [(1, [0.05]), (2, [0.05, 1, 25, 1000]), (3, [0.05]), (4, [0.05])])
def test_weights_after_20_clipped_steps_are_the_same_bits_in_every_configuration(pool, world_size, sizes):
    assert pool.run(world_size, configurations_with_other_weights, sizes) == [([], True)] * world_size


def configurations_with_other_weights(comm, sizes):
    ddp, _, norms = train(comm, 0)
    want, norms = weight_bits(ddp), [bits(norm) for norm in norms]
    found = []
    for stage, bucket_mb, overlap, symmetric in itertools.product(STAGES, sizes, (True, False), (True, False)):
        options = {"bucket_mb": bucket_mb, "overlap": overlap, "symmetric": symmetric}
        other, _, other_norms = train(comm, stage, **options)
        if weight_bits(other) != want or [bits(norm) for norm in other_norms] != norms:
            found.append((stage, options))
    return found, want != weight_bits(network())


@every_world_size
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "grad_dtype": torch.float32},
        {"wire_dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "grad_dtype": torch.float32, "wire_dtype": torch.bfloat16},
        {"max_norm": None},
        {"micro_batches": 3},
    ],
    ids=str,
)
def test_weights_are_the_same_bits_in_every_stage(pool, world_size, options):
    assert pool.run(world_size, stages_with_other_weights, options) == [[]] * world_size


def stages_with_other_weights(comm, options):
    # Stage 2 averages every micro-batch for itself, so accumulation rounds in another order there.
    stages = STAGES if options.get("micro_batches", 1) == 1 else STAGES[:2]
    want = None
    found = []
    for stage, overlap, symmetric in itertools.product(stages, (True, False), (True, False)):
        ddp, _, _ = train(comm, stage, num_steps=4, overlap=overlap, symmetric=symmetric, bucket_mb=0.02, **options)
        want = want or weight_bits(ddp)
        if weight_bits(ddp) != want:
            found.append((stage, overlap, symmetric))
    return found


@every_world_size
@every_stage
def test_twenty_steps_are_those_of_torch_within_rounding(pool, world_size, stage):
    results = pool.run(world_size, difference_from_torch, stage)
    assert all(worst <= bound for worst, bound in results), results


def difference_from_torch(comm, stage):
    """Both get the same gradients, so only the roundings of the update differ.

    A step computes p * decay - (m / d) * s with d = sqrt(v) / c + eps: in each of the two evaluations p passes two
    roundings, and the update, at most U = |m / d| * s, the roundings of m (3 a step, decaying with beta1, so at most
    3 / (1 - beta1) in all), of d (v: 3 / (1 - beta2), halved by the root; root, quotient, sum: 3), of the quotient and
    of the product: fewer than 30 + 33 + 5 = 68. |m / d| is less than 3 here, since |m| <= sqrt(v / c) * sqrt((1 -
    beta1)^2 / (1 - beta2)) / (1 - beta1 / sqrt(beta2)) < 3 (Cauchy-Schwarz; Kingma and Ba, 2015, section 2.1).
    """
    ddp = DataParallel(network(), comm)
    twin = network()
    ours = ShardedAdamW(ddp, lr=0.01, stage=stage)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(NUM_STEPS):
        for model, optimizer in ((ddp, ours), (twin, theirs)):
            optimizer.zero_grad()
            loss_on(model, 0, step).backward()  # every rank the same rows: the average is exact, but for world size 3
            optimizer.step()
        with torch.no_grad():  # gradients of different weights would differ
            for p, q in zip(ddp.parameters(), twin.parameters(), strict=True):
                assert torch.allclose(p, q, rtol=0, atol=1e-5)
                worst = max(float((p - q).abs().max()) if p.numel() else 0.0, locals().get("worst", 0.0))
                q.copy_(p)
    largest = max(float(p.abs().max()) for p in ddp.parameters() if p.numel())
    u = 2**-24
    return worst, 2 * u * (2 * largest + 68 * 3 * 0.01) + (2 * u * 3 * 0.01 * 3 if comm.world_size == 3 else 0)


@every_world_size
def test_stage_2_averages_every_micro_batch(pool, world_size):
    """Three averages added instead of one average of three sums: two more roundings each of gradients, in both."""
    for by_backward, at_once, majorant in pool.run(world_size, shards_and_gradients):
        for name, shard in by_backward.items():
            bound = (2 * 3 + 2 * world_size + 2) * 2**-24 * majorant[name]
            assert bool(((shard - at_once[name]).abs() <= bound).all()), name


def shards_and_gradients(comm):
    """This rank's shards after three averaged backwards, the average of three accumulated ones, and of magnitudes."""
    ddp, _, _ = train(comm, 2, num_steps=0)
    whole, _, _ = train(comm, 0, num_steps=0)
    magnitudes = {name: torch.zeros_like(p) for name, p in network().named_parameters()}
    for micro_batch in range(3):
        loss_on(ddp, comm.rank, 0, micro_batch).backward()
        for rank in range(comm.world_size):
            plain = network()
            loss_on(plain, rank, 0, micro_batch).backward()
            for name, param in plain.named_parameters():
                if param.grad is not None:
                    magnitudes[name] += param.grad.abs() / comm.world_size
    with whole.no_sync():
        loss_on(whole, comm.rank, 0, 0).backward()
        loss_on(whole, comm.rank, 0, 1).backward()
    loss_on(whole, comm.rank, 0, 2).backward()
    gradients = ddp._engine.gradients
    (shards,) = gradients.buffers.values()
    own = {trained.name: slice(trained.shard.begin, trained.shard.end) for trained in gradients.params}
    assert all(p.grad is None or type(p.grad) is AbsentGradient for p in ddp.parameters())
    return (
        {p.name: p.shard.of(shards).clone() for p in gradients.params},
        {name: p.grad.flatten()[own[name]].clone() for name, p in whole.module.named_parameters() if name in own},
        {name: magnitudes[name].flatten()[own[name]] for name in own},
    )


@every_world_size
@pytest.mark.parametrize("overlap", [True, False])
def test_stage_1_averages_the_shard_also_when_backwards_add_up(pool, world_size, overlap):
    assert pool.run(world_size, differing_shards, overlap) == [[]] * world_size


def differing_shards(comm, overlap):
    """avg(g0) + avg(g1) + avg(g2), where the third went through no_sync() first."""
    ddp, _, _ = train(comm, 1, num_steps=0, overlap=overlap, bucket_mb=0.02)
    loss_on(ddp, comm.rank, 0).backward()
    pycomm.clip_grad_norm_(ddp, 1e9)  # has them averaged
    with ddp.no_sync():
        loss_on(ddp, comm.rank, 1).backward()
    loss_on(ddp, comm.rank, 2).backward()
    norm = pycomm.clip_grad_norm_(ddp, 1e9)
    plain = []
    for rank in range(comm.world_size):
        first, rest = network(), network()
        loss_on(first, rank, 0).backward()
        loss_on(rest, rank, 1).backward()
        loss_on(rest, rank, 2).backward()
        plain.append((first, rest))
    found = []
    square = 0.0
    for trained in ddp._engine.gradients.params:
        sums = []
        for models in zip(*plain, strict=True):
            grads = [dict(model.named_parameters())[trained.name].grad for model in models]
            total = grads[0].clone()
            for grad in grads[1:]:
                total += grad
            sums.append(total / comm.world_size)
        want = (sums[1] + sums[0]).flatten()
        square += float(want.double().square().sum())
        if bits(trained.param.grad.flatten()[trained.shard.begin : trained.shard.end]) != bits(
            want[trained.shard.begin : trained.shard.end]
        ):
            found.append(trained.name)
    assert abs(float(norm) - square**0.5) <= 1e-6 * square**0.5  # fp32 rounding of the result, and fp64 sums
    return found


def two_groups(model, lr=0.01):
    decayed = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("weight")]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("weight")]
    return [
        {"params": decayed, "weight_decay": 0.5},
        {"params": others, "weight_decay": 0.0, "lr": lr, "betas": (0.5, 0.9)},
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_groups_and_schedules(pool, world_size):
    """Against torch's AdamW on the same gradients; the bound is that of the test against torch."""
    for worst, lrs in pool.run(world_size, difference_with_groups):
        assert worst <= 2 * 2**-24 * (2 * 1.0 + 68 * 3 * 0.02) + 1e-6
        assert lrs == [pytest.approx(0.02 * 0.7**5), pytest.approx(0.01 * 0.7**5)]


def difference_with_groups(comm):
    found = []
    for stage in STAGES:
        ddp, twin = DataParallel(network(), comm), network()
        ours = ShardedAdamW(ddp, lr=0.02, stage=stage, param_groups=two_groups(ddp.module))
        theirs = torch.optim.AdamW(two_groups(twin), lr=0.02, betas=(0.9, 0.95))
        schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in (ours, theirs)]
        for step in range(5):
            for model, optimizer, schedule in zip((ddp, twin), (ours, theirs), schedules, strict=True):
                optimizer.zero_grad()
                loss_on(model, 0, step).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                for p, q in zip(ddp.parameters(), twin.parameters(), strict=True):
                    found.append(float((p - q).abs().max()) if p.numel() else 0.0)
                    q.copy_(p)
    return max(found), [group["lr"] for group in ours.param_groups]


@every_world_size
def test_wrong_arguments_are_said(pool, world_size):
    for messages in pool.run(world_size, messages_of_wrong_arguments):
        for message, part in zip(
            messages,
            (
                "stage=3",
                "betas=(0.9, 1.0)",
                "lr=-1",
                "in no group, the first is '0.bias'",
                "float64",
                "already",
                "added",
            ),
            strict=True,
        ):
            assert part in message


def messages_of_wrong_arguments(comm):
    def make(model=None, **options):
        return ShardedAdamW(DataParallel(model or network(), comm), **options)

    wide = network(torch.float64)
    ddp = DataParallel(network(), comm)
    some = [{"params": [ddp.module[0].weight]}]
    optimizer = make()
    used = DataParallel(network(), comm)
    ShardedAdamW(used)
    return [
        message_of(ValueError, lambda: make(stage=3)),
        message_of(ValueError, lambda: make(betas=(0.9, 1.0))),
        message_of(ValueError, lambda: make(lr=-1)),
        message_of(ValueError, lambda: ShardedAdamW(ddp, param_groups=some)),
        message_of(ValueError, lambda: make(wide)),
        message_of(ValueError, lambda: ShardedAdamW(used)),
        message_of(ValueError, optimizer.add_param_group, {"params": [nn.Parameter(torch.ones(1))]}),
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_different_optimizers_are_refused_on_every_rank(pool, world_size):
    assert all("stage=2" in m and "stage=1" in m for m in pool.run(world_size, message_of_different_stages))


def message_of_different_stages(comm):
    ddp = DataParallel(network(), comm)
    return message_of(MismatchError, lambda: ShardedAdamW(ddp, stage=2 if comm.rank == 1 else 1))


@every_world_size
@every_stage
def test_a_step_without_averages(pool, world_size, stage):
    assert all(pool.run(world_size, steps_without_averages, stage))


def steps_without_averages(comm, stage):
    ddp, optimizer, _ = train(comm, stage, num_steps=1)
    before = weight_bits(ddp)
    optimizer.zero_grad()
    optimizer.step()  # as torch's: nothing to do
    assert weight_bits(ddp) == before
    with ddp.no_sync():
        loss_on(ddp, comm.rank, 1).backward()
    message = message_of(PycommError, optimizer.step)
    assert weight_bits(ddp) == before
    return "no_sync()" in message


@every_world_size
@every_stage
@pytest.mark.parametrize("overlap", [True, False])
def test_the_norm_of_zeroed_gradients_is_zero(pool, world_size, stage, overlap):
    """Catches a norm of what the last backward has left in memory."""
    assert pool.run(world_size, norms_around_zeroing, stage, overlap) == [(True, 0.0)] * world_size


def norms_around_zeroing(comm, stage, overlap):
    ddp, optimizer, _ = train(comm, stage, num_steps=0, overlap=overlap)
    loss_on(ddp, comm.rank, 0).backward()
    before = pycomm.clip_grad_norm_(ddp, MAX_NORM)
    optimizer.zero_grad()
    return bool(before > 0), float(pycomm.clip_grad_norm_(ddp, MAX_NORM))


@every_world_size
@every_stage
@pytest.mark.parametrize("overlap", [True, False])
def test_non_finite_gradients_leave_everything_as_it_was_and_are_named(pool, world_size, stage, overlap):
    assert all(pool.run(world_size, outcome_of_non_finite, stage, overlap))


def outcome_of_non_finite(comm, stage, overlap):
    ddp, optimizer, _ = train(comm, stage, num_steps=2, overlap=overlap)
    before, states = weight_bits(ddp), optimizer.state_dict()["state"]
    loss = loss_on(ddp, comm.rank, 2)
    if comm.rank == comm.world_size - 1:
        ddp.module[2].bias.register_hook(lambda grad: grad * float("inf"))
    optimizer.zero_grad()
    loss.backward()
    message = message_of(PycommError, lambda: pycomm.clip_grad_norm_(ddp, MAX_NORM, error_if_nonfinite=True))
    norm = pycomm.clip_grad_norm_(ddp, MAX_NORM)
    optimizer.step()
    after = optimizer.state_dict()["state"]
    return (
        "not finite: '2.bias'" in message
        and not torch.isfinite(norm)
        and weight_bits(ddp) == before
        and optimizer.num_skipped == 1
        and all(torch.equal(states[key][name], after[key][name]) for key in states for name in states[key])
    )


@every_world_size
@every_stage
def test_values_loaded_into_bfloat16_parameters_count(pool, world_size, stage):
    assert all(pool.run(world_size, loading_counts, stage))


def loading_counts(comm, stage):
    ddp, optimizer, _ = train(comm, stage, num_steps=1, dtype=torch.bfloat16, max_norm=None)
    ddp.load_state_dict({name: torch.ones_like(p) for name, p in ddp.state_dict().items()})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    loss_on(ddp, comm.rank, 1).backward()
    optimizer.step()
    return all(bool((p == 1).all()) for p in ddp.parameters())


@every_world_size
@every_stage
def test_join_with_a_step_keeps_replicas_and_states_together(pool, world_size, stage):
    results = pool.run(world_size, join_with_steps, stage)
    assert results == [results[0]] * world_size


def join_with_steps(comm, stage):
    """Rank r has r + 1 batches; the average always divides by the number of ranks."""
    ddp = DataParallel(mlp(), comm)
    optimizer = ShardedAdamW(ddp, lr=0.01, stage=stage)

    def after_backward():
        pycomm.clip_grad_norm_(ddp, 0.1)
        optimizer.step()
        optimizer.zero_grad()

    with ddp.join(after_backward):
        for step in range(comm.rank + 1):
            loss_of(ddp, comm.rank, step).backward()
            after_backward()
    state = optimizer.state_dict()["state"]
    assert float(state[0]["step"]) == comm.world_size
    if stage > 0:
        assert "after_backward" in message_of(ValueError, ddp.join().__enter__)
    return weight_bits(ddp), {key: bits(entry["exp_avg"]) for key, entry in state.items()}
