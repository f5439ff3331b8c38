"""Pipelines whose optimizer states and gradients are sharded over the replicas (ZeRO): dp x pp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pycomm
from pycomm import Communicator
from pycomm.errors import MismatchError
from pycomm.models import gpt_stages, next_token_loss
from pycomm.pipeline import NAMES, Pipeline, PipelineStage, build
from tests.data_parallel.helpers import Recorder, rank_order_average
from tests.pipeline.helpers import (
    MICROBATCHES,
    TIED,
    Reference,
    batch,
    largest_difference,
    model,
    nudge,
    schedule_of,
)
from tests.pool import Pool

STAGES = (1, 2)  # of ShardedAdamW
MAX_NORM = 0.3  # less than the norms here, so that clipping does something
LR = 1e-2
Parts = dict[str, list[tuple[int, Tensor]]]


class Replica:
    """This rank's stages of a pipeline of which each stage is sharded over ``mesh.dp``."""

    def __init__(self, mesh: pycomm.Mesh, name: str, zero: int, events: list[object], **options: bool) -> None:
        self.mesh, schedule = mesh, schedule_of(name, mesh.pp.world_size)
        self.wrapped: list[pycomm.DataParallel] = []

        def wrap(module: torch.nn.Module) -> pycomm.DataParallel:
            self.wrapped.append(pycomm.DataParallel(module, Recorder(mesh.dp, events), bucket_mb=0.005, **options))
            return self.wrapped[-1]

        stages = gpt_stages(model(), mesh.pp, schedule.rank_of, wrap=wrap)
        self.optimizers = [pycomm.ShardedAdamW(ddp, lr=LR, stage=zero) for ddp in self.wrapped]
        self.pipe = Pipeline(stages, schedule, next_token_loss)
        self.is_first, self.is_last = (mesh.pp_rank == schedule.rank_of[end] for end in (0, -1))

    def step(self, step: int) -> float | None:
        """Loss and gradients of this replica's batch, which add to what is there."""
        inputs, targets = batch(10 * step + self.mesh.dp_rank)
        loss = self.pipe.step(inputs if self.is_first else None, targets if self.is_last else None)
        return None if loss is None else float(loss)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def parts(self) -> Parts:
        """What this rank has of each parameter's gradient, by the names of the whole model."""
        named = [(ddp, name, param) for ddp in self.wrapped for name, param in ddp.module.named_parameters()]
        return {name: [(at, t.flatten().clone()) for at, t in ddp.gradient_parts(p)] for ddp, name, p in named}


def sharded_gradients(comm: Communicator, name: str, pp: int, zero: int) -> tuple[list[float], Parts, float]:
    """Losses, gradients of the last of two steps, and how often its gradients travelled."""
    with pycomm.Mesh(comm, dp=comm.world_size // pp, pp=pp) as mesh:
        events: list[object] = []
        replica = Replica(mesh, name, zero, events)
        losses = []
        for step in range(2):
            replica.zero_grad()
            events.clear()
            losses.append(replica.step(step))
        times = len(events) / sum(len(ddp.bucket_bytes) for ddp in replica.wrapped)
        return [loss for loss in losses if loss is not None], replica.parts(), times


def averages(references: list[Reference], step: int, zero: int) -> dict[str, Tensor]:
    """Of all replicas' gradients in ``step``: of their sums, or for stage 2 the sum of every micro-batch's averages."""
    by_replica = [list(ref.of_microbatches(10 * step + replica)) for replica, ref in enumerate(references)]
    total: dict[str, Tensor] = {}
    if zero == 2:
        for same in zip(*by_replica, strict=True):
            for name in references[0].params:
                average = rank_order_average([grads[name] for _, grads in same])
                total[name] = total[name] + average if name in total else average
    else:
        for name in references[0].params:
            sums = []
            for microbatches in by_replica:
                grads = [grads[name] for _, grads in microbatches]
                sums.append(sum(grads[1:], grads[0]))
            total[name] = rank_order_average(sums)
    total[TIED[0]] = total[TIED[1]] = total[TIED[0]] + total[TIED[1]]
    return total


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_shards_are_those_of_the_average(pool: Pool, name: str, zero: int) -> None:
    """To the bit, also where backward is split: hooks of the wrapper need autograd's own gradients."""
    results = pool.run(4, sharded_gradients, name, 2, zero)
    references = [Reference(), Reference()]
    want_losses = [
        [sum((loss for loss, _ in list(ref.of_microbatches(10 * s + r))), torch.tensor(0.0)) for s in range(2)]
        for r, ref in enumerate(references)
    ]
    assert [got for got, _, _ in results if got] == [[float(loss) for loss in losses] for losses in want_losses]
    want = averages(references, 1, zero)
    covered = {key: torch.zeros(grad.numel()) for key, grad in want.items()}
    for _, parts, times in results:
        # Buckets fire on the last micro-batch; stage 2 sends each through a pool of buffers, every micro-batch.
        assert times == 1 if zero == 1 else times >= MICROBATCHES
        for key, found in parts.items():
            ((start, values),) = found
            assert torch.equal(values, want[key].flatten()[start : start + len(values)]), key
            covered[key][start : start + len(values)] += 1
    assert all(bool((count == 1).all()) for count in covered.values())  # of each stage, by two replicas together


def train(comm: Communicator, name: str, zero: int, overlap: bool) -> tuple[list[float], list[float], list[float]]:
    """Losses and norms of 20 steps, and what state_dict has of the last."""
    with pycomm.Mesh(comm, dp=2, pp=comm.world_size // 2) as mesh:
        replica = Replica(mesh, name, zero, [], overlap=overlap)
        losses, norms = [], []
        for step in range(20):
            replica.zero_grad()
            losses.append(replica.step(step % 2))
            norms.append(float(pycomm.clip_grad_norm_(replica.wrapped, MAX_NORM, mesh)))
            for optimizer in replica.optimizers:
                optimizer.step()
        return [loss for loss in losses if loss is not None], norms


def curves(zero: int, nudged: float = 0.0) -> tuple[list[list[float]], list[float]]:
    """The same training in one process: losses of both replicas, norms.

    Args:
        nudged: change every weight by this part of itself before every step.
    """
    references = [Reference(), Reference()]
    first, second = (ref.params for ref in references)
    trained = [param for key, param in first.items() if key != TIED[1]]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    losses: list[list[float]] = [[], []]
    norms = []
    for step in range(20):
        nudge(trained, nudged, generator)
        first[TIED[1]].data.copy_(first[TIED[0]].data)
        for key, param in second.items():
            param.data.copy_(first[key].data)
        for replica, ref in enumerate(references):
            losses[replica].append(sum(float(loss) for loss, _ in ref.of_microbatches(10 * (step % 2) + replica)))
        for key, grad in averages(references, step % 2, zero).items():
            first[key].grad = grad
        norms.append(float(pycomm.clip_grad_norm_(trained, MAX_NORM)))
        optimizer.step()
    return losses, norms


@pytest.mark.parametrize(
    ("name", "zero", "overlap"), [("1f1b", 1, True), ("1f1b", 2, False), ("zb_h1", 1, False), ("zb_v", 2, True)]
)
def test_twenty_clipped_steps_have_the_loss_curve_of_one_process(
    pool: Pool, name: str, zero: int, overlap: bool
) -> None:
    """Within what a change of every weight by a rounding or two in every step makes of one process's curve."""
    losses, norms = curves(zero)
    nudged_losses, nudged_norms = curves(zero, nudged=2**-22)
    results = pool.run(4, train, name, zero, overlap)
    assert len({tuple(got) for _, got in results}) == 1  # the same bits of norms everywhere
    bound = max(largest_difference(a, b) for a, b in zip(losses, nudged_losses, strict=True))
    assert 0 < bound < 1e-3 * losses[0][0]  # else it would not say much
    for got, want in zip([got for got, _ in results if got], losses, strict=True):
        assert largest_difference(got, want) <= bound
    assert largest_difference(results[0][1], norms) <= largest_difference(norms, nudged_norms)
    assert min(norms) > MAX_NORM


def accumulated_shards(comm: Communicator, name: str, zero: int, overlap: bool) -> Parts:
    """Two steps that add up."""
    with pycomm.Mesh(comm, dp=2, pp=comm.world_size // 2) as mesh:
        replica = Replica(mesh, name, zero, [], overlap=overlap)
        for step in range(2):
            replica.step(step)
        return replica.parts()


@pytest.mark.parametrize(
    ("name", "zero", "overlap"), [("1f1b", 1, True), ("1f1b", 1, False), ("1f1b", 2, True), ("zb_v", 2, False)]
)
def test_shards_of_several_steps_add_up(pool: Pool, name: str, zero: int, overlap: bool) -> None:
    references = [Reference(), Reference()]
    both = [averages(references, step, zero) for step in range(2)]
    for parts in pool.run(4, accumulated_shards, name, zero, overlap):
        for key, found in parts.items():
            got = sum(values for _, values in found)
            start = found[0][0]
            want = sum(total[key].flatten()[start : start + len(got)] for total in both)
            # Orders of at most 2 steps x 4 micro-batches x 2 replicas x 2 copies differ: 2 (32 - 1) u sum |terms|.
            for step in range(2):
                for replica, ref in enumerate(references):
                    for _, grads in ref.of_microbatches(10 * step + replica):
                        ref.abs_sums[key] += grads[key].abs()
            sums = sum(ref.abs_sums[k].flatten() for ref in references for k in (TIED if key in TIED else (key,)))
            assert bool(((got - want).abs() <= 2 * 31 * 2**-24 * sums[start : start + len(got)]).all()), key


def other_turns(comm: Communicator) -> None:
    with pycomm.Mesh(comm, dp=2, pp=2) as mesh:
        module = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(1 + mesh.pp_rank)])
        shared = module[-1].weight  # number 0 of the first stage, 1 of the second
        ddp = pycomm.DataParallel(module, mesh.dp)
        pycomm.ShardedAdamW(ddp, stage=1)
        stage = PipelineStage(ddp, mesh.pp_rank, 2, mesh.pp, shared={"w": shared})
        pipe = Pipeline(stage, build("1f1b", 2, 2), torch.nn.functional.mse_loss)
        x = torch.ones(4, 64)
        with pytest.raises(MismatchError, match="shard_turn"):
            pipe.step(x, x)


def test_copies_with_other_shards_are_refused(pool: Pool) -> None:
    pool.run(4, other_turns)
