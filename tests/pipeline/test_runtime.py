"""A pipelined GPT against one process: losses, gradients, training, evaluation, accumulation."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pycomm import Communicator
from pycomm.pipeline import NAMES, Timeline, measured_costs, simulate
from tests.pipeline.helpers import (
    CONFIG,
    MICROBATCHES,
    TIED,
    Reference,
    batch,
    gradients,
    model,
    on_this_rank,
    pipeline,
    schedule_of,
    uneven_cuts,
)
from tests.pool import Pool

NUM_STEPS = 3


SPLIT = ("zb_h1", "zb_v")


def dtype_of(name: str) -> torch.dtype:
    """Where backward is split, the product of a linear layer is added to ``.grad`` with one rounding less than in one
    process. So these are compared in fp64, where rounding is 1e-16 and a wrong term stands out all the more."""
    return torch.float64 if name in SPLIT else torch.float32


def losses_and_gradients(comm: Communicator, name: str, ordered: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Of steps whose gradients add up: the first without slots, the others with. Losses of the last stage's rank."""
    schedule = schedule_of(name, comm.world_size)
    cuts = uneven_cuts(schedule.num_stages) if ordered else None
    pipe, params = pipeline(comm, model(dtype_of(name)), schedule, cuts, ordered=ordered)
    losses = [pipe.step(*on_this_rank(comm, schedule, step)) for step in range(NUM_STEPS)]
    return [float(loss) for loss in losses if loss is not None], gradients(iter(params.items()))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("ordered", [False, True], ids=["beside", "ordered"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_one_process(pool: Pool, name: str, ordered: bool, world_size: int) -> None:
    """Bit for bit, but for rounding where backward is split.

    Strict communicators and ``ordered``: sends block until they are matched, and nothing deadlocks.
    """
    reference = Reference(dtype_of(name))
    losses = [reference.step(step) for step in range(NUM_STEPS)]
    results = pool.run(world_size, losses_and_gradients, name, ordered)
    assert [got for got, _ in results if got] == [losses]
    schedule = schedule_of(name, world_size)
    apart = schedule.num_stages > 1
    missing = set(reference.params) - {key for _, grads in results for key in grads}
    assert missing <= ({"unembedding.weight"} if schedule.num_stages == 1 else set())
    for _, grads in results:
        for key, grad in grads.items():
            want = reference.params[key].grad
            assert want is not None
            if name in SPLIT:
                # Products of fewer than 1,000 terms, each with a few roundings of 1.1e-16 on its way.
                assert float((grad - want).abs().max()) <= 1e-11 * float(reference.abs_sums[key].max()), key
            elif apart or key not in TIED:
                assert torch.equal(grad, want), key
            else:
                # One parameter gets both gradients of every micro-batch in turn, instead of two sums: another order of
                # n = 2 * MICROBATCHES * NUM_STEPS terms, of which any two differ by at most 2 (n - 1) u sum |terms|.
                bound = 2 * (2 * MICROBATCHES * NUM_STEPS - 1) * 2**-24
                sums = reference.abs_sums[TIED[0]] + reference.abs_sums[TIED[1]]
                assert bool(((grad - want).abs() <= bound * sums).all()), key


def train(comm: Communicator, name: str) -> tuple[list[float], dict[str, Tensor]]:
    schedule = schedule_of(name, comm.world_size)
    pipe, params = pipeline(comm, model(dtype_of(name)), schedule)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        losses.append(pipe.step(*on_this_rank(comm, schedule, step % 2)))
        optimizer.step()
    return [float(loss) for loss in losses if loss is not None], {k: p.detach().clone() for k, p in params.items()}


@pytest.mark.parametrize(("name", "world_size"), [("1f1b", 2), ("interleaved_1f1b", 3), ("zb_h1", 4), ("zb_v", 2)])
def test_twenty_steps_have_the_loss_curve_of_one_process(pool: Pool, name: str, world_size: int) -> None:
    reference = Reference(dtype_of(name))
    optimizer = torch.optim.AdamW(reference.params.values(), lr=1e-2)
    want = []
    for step in range(20):
        optimizer.zero_grad()
        want.append(reference.step(step % 2))
        optimizer.step()
    results = pool.run(world_size, train, name)
    (losses,) = [losses for losses, _ in results if losses]
    assert want[-1] < want[0] - 0.5
    if name in SPLIT:
        # Adam divides a gradient by its own size, so rounding of 1e-16 moves a weight by 1e-16 / |gradient| of a step:
        # gradients above 1e-8 leave a factor of 10 for what 20 steps make of it.
        assert max(abs(loss - other) for loss, other in zip(losses, want, strict=True)) < 1e-7
        return
    assert losses == want
    for _, weights in results:
        assert all(torch.equal(weight, reference.params[key]) for key, weight in weights.items())


def evaluate(comm: Communicator, name: str, ordered: bool) -> list[float]:
    schedule = schedule_of(name, comm.world_size)
    pipe, params = pipeline(comm, model(), schedule, ordered=ordered)
    losses = [pipe.evaluate(*on_this_rank(comm, schedule, 5))]
    pipe.step(*on_this_rank(comm, schedule, 0))
    before = gradients(iter(params.items()))
    losses += [pipe.evaluate(*on_this_rank(comm, schedule, step)) for step in (5, 0)]
    assert all(torch.equal(grad, before[key]) for key, grad in gradients(iter(params.items())).items())
    return [float(loss) for loss in losses if loss is not None]


@pytest.mark.parametrize("ordered", [False, True], ids=["beside", "ordered"])
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_runs_forward_only(pool: Pool, name: str, ordered: bool) -> None:
    reference = Reference()
    want = [reference.step(5), reference.step(5), reference.step(0)]
    assert [got for got in pool.run(3, evaluate, name, ordered) if got] == [want]


def other_batch_sizes(comm: Communicator) -> list[float]:
    """Smaller than the slots, and larger: then tensors travel as messages of their own."""
    schedule = schedule_of("1f1b", comm.world_size)
    pipe, _ = pipeline(comm, model(torch.float64), schedule)
    losses = []
    for rows in (8, 4, 19, 8):
        inputs, targets = batch(rows, rows)
        losses.append(pipe.step(inputs if comm.rank == 0 else None, targets if comm.rank == 1 else None))
    return [float(loss) for loss in losses if loss is not None]


def test_batches_of_other_sizes(pool: Pool) -> None:
    _, losses = pool.run(2, other_batch_sizes)
    whole = model(torch.float64)
    for rows, loss in zip((8, 4, 19, 8), losses, strict=True):
        inputs, targets = batch(rows, rows)
        want = torch.nn.functional.cross_entropy(whole(inputs).flatten(0, 1), targets.flatten())
        # The mean over all tokens at once, in fp64: fewer than 1e4 roundings of 1.2e-16 of terms of a few nats each.
        assert abs(loss - float(want.detach())) < 1e-11


def measured(comm: Communicator, name: str) -> Timeline:
    schedule = schedule_of(name, comm.world_size)
    pipe, _ = pipeline(comm, model(), schedule)
    for step in range(2):
        pipe.step(*on_this_rank(comm, schedule, step))
    return pipe.timeline()


@pytest.mark.parametrize("name", NAMES)
def test_measured_timeline_is_what_the_schedule_says(pool: Pool, name: str) -> None:
    timeline, other = pool.run(2, measured, name)
    assert timeline == other
    schedule = schedule_of(name, 2)
    for spans, actions in zip(timeline.ranks, schedule.ranks, strict=True):
        assert [span.action for span in spans] == [action for action in actions if "_" not in action.kind]
        assert all(span.start <= span.end for span in spans)
        assert all(a.end <= b.start for a, b in pairwise(spans))
    starts = {span.action: span.start for spans in timeline.ranks for span in spans}
    ends = {span.action: span.end for spans in timeline.ranks for span in spans}
    assert all(  # one clock: no stage begins before it can have its input
        ends[before] <= start
        for action, start in starts.items()
        for before in starts
        if action.kind == before.kind == "F" and action.microbatch == before.microbatch
        if before.stage == action.stage - 1
    )
    costs = measured_costs([timeline, timeline], schedule.num_stages)
    assert simulate(schedule, costs).makespan > 0
    assert timeline.peak_activations == simulate(schedule).peak_activations
    assert len(costs.f) == len(costs.b) == schedule.num_stages  # type: ignore[arg-type]
    assert CONFIG.num_layers + 2 >= schedule.num_stages
