"""Pipelines whose stages are data parallel: averages of the replicas' gradients, one reduction a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pycomm
from pycomm import Communicator
from pycomm.models import gpt_stages, next_token_loss
from pycomm.pipeline import NAMES, Pipeline
from tests.data_parallel.helpers import Recorder
from tests.pipeline.helpers import TIED, Reference, batch, gradients, model, schedule_of
from tests.pool import Pool


def replicas(comm: Communicator, name: str, pp: int) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses, gradients of the last of two steps, and how many reductions that one had beyond one for each bucket."""
    with pycomm.Mesh(comm, dp=comm.world_size // pp, pp=pp) as mesh:
        schedule = schedule_of(name, pp)
        events: list[object] = []
        recorder = Recorder(mesh.dp, events)
        wrapped: list[pycomm.DataParallel] = []

        def wrap(module: nn.Module) -> nn.Module:
            wrapped.append(pycomm.DataParallel(module, recorder, bucket_mb=0.005))
            return wrapped[-1]

        stages = gpt_stages(model(), mesh.pp, schedule.rank_of, wrap=wrap)
        pipe = Pipeline(stages, schedule, next_token_loss)
        losses = []
        for step in range(2):
            for stage in stages:
                stage.module.zero_grad()
            events.clear()
            inputs, targets = batch(10 * step + mesh.dp_rank)
            first, last = mesh.pp_rank == schedule.rank_of[0], mesh.pp_rank == schedule.rank_of[-1]
            loss = pipe.step(inputs if first else None, targets if last else None)
            losses += [] if loss is None else [float(loss)]
        params = {name: param for ddp in wrapped for name, param in ddp.module.named_parameters()}
        assert all(len(ddp.bucket_bytes) > 1 for ddp in wrapped)
        extra = len(events) - sum(len(ddp.bucket_bytes) for ddp in wrapped)
        return losses, gradients(iter(params.items())), extra


@pytest.mark.parametrize(("world_size", "pp"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_average_over_replicas(pool: Pool, name: str, world_size: int, pp: int) -> None:
    results = pool.run(world_size, replicas, name, pp)
    references = [Reference(), Reference()]
    losses = []
    for replica, reference in enumerate(references):
        losses.append([])
        for step in range(2):
            reference.whole.zero_grad()
            losses[-1].append(reference.step(10 * step + replica, tied=False))
    assert [got for got, _, _ in results if got] == losses
    want = {key: (references[0].params[key].grad + references[1].params[key].grad) / 2 for key in references[0].params}
    want[TIED[0]] = want[TIED[1]] = want[TIED[0]] + want[TIED[1]]
    apart = schedule_of(name, pp).num_stages > 1
    for _, grads, extra in results:
        assert extra == 0
        for key, grad in grads.items():
            if apart or key not in TIED:
                assert torch.equal(grad, want[key]), key
            else:
                # One parameter with both gradients of every micro-batch, averaged at once: another order of 16 terms.
                bound = 2 * 16 * 2**-24 * sum(ref.abs_sums[tied] for ref in references for tied in TIED)
                assert bool(((grad - want[key]).abs() <= bound).all()), key


def accumulated(comm: Communicator, name: str) -> dict[str, Tensor]:
    """Two steps, the first one under no_sync."""
    with pycomm.Mesh(comm, dp=2, pp=comm.world_size // 2) as mesh:
        schedule = schedule_of(name, mesh.pp.world_size)
        stages = gpt_stages(model(), mesh.pp, schedule.rank_of, wrap=lambda m: pycomm.DataParallel(m, mesh.dp))
        pipe = Pipeline(stages, schedule, next_token_loss)
        first, last = mesh.pp_rank == schedule.rank_of[0], mesh.pp_rank == schedule.rank_of[-1]
        for step in range(2):
            inputs, targets = batch(10 * step + mesh.dp_rank)
            if step == 0:
                with stages[0].module.no_sync():  # type: ignore[operator]
                    pipe.step(inputs if first else None, targets if last else None)
            else:
                pipe.step(inputs if first else None, targets if last else None)
        params = {key: param for stage in stages for key, param in stage.module.module.named_parameters()}  # type: ignore[union-attr]
        return gradients(iter(params.items()))


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_steps_without_synchronisation_accumulate(pool: Pool, name: str) -> None:
    results = pool.run(4, accumulated, name)
    references = [Reference(), Reference()]
    for replica, reference in enumerate(references):
        for step in range(2):
            reference.step(10 * step + replica)
    for grads in results:
        for key, grad in grads.items():
            if key not in TIED:
                want = (references[0].params[key].grad + references[1].params[key].grad) / 2
                assert torch.equal(grad, want), key
            else:
                want = (references[0].params[TIED[0]].grad + references[1].params[TIED[0]].grad) / 2
                # The two copies are averaged before they are added, in the reference after: other orders of 32 terms.
                bound = 2 * 32 * 2**-24 * sum(ref.abs_sums[tied] for ref in references for tied in TIED)
                assert bool(((grad - want).abs() <= bound).all()), key
