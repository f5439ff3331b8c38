"""Pipelines whose stages are tensor parallel: tp x pp, the model cut by :func:`pycomm.tensor_parallel.parallelize`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pycomm
from pycomm import Communicator
from pycomm.models import gpt_stages, next_token_loss
from pycomm.pipeline import NAMES, Pipeline
from pycomm.tensor_parallel import auto_plan, parallelize, shards_of, vocab_parallel_cross_entropy
from tests.pipeline.helpers import TIED, Reference, batch, largest_difference, model, nudge, schedule_of
from tests.pool import Pool

NUM_STEPS = 2


class Cut:
    """This rank's stages of a pipeline of tensor-parallel layers, in fp64."""

    def __init__(self, mesh: pycomm.Mesh, name: str, sequence_parallel: bool) -> None:
        whole = model(torch.float64)
        plan = auto_plan(whole)
        loss_fn = next_token_loss
        if sequence_parallel:  # and logits stay where they are computed

            def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
                return vocab_parallel_cross_entropy(logits, targets, mesh.tp)

            plan |= {"unembedding": "colwise"}
        parallelize(whole, mesh.tp, plan, sequence_parallel=sequence_parallel)
        self.mesh, schedule = mesh, schedule_of(name, mesh.pp.world_size)
        stages = gpt_stages(whole, mesh.pp, schedule.rank_of)
        self.modules = [stage.module for stage in stages]
        self.pipe = Pipeline(stages, schedule, loss_fn)
        self.is_first, self.is_last = (mesh.pp_rank == schedule.rank_of[end] for end in (0, -1))

    def step(self, step: int) -> float | None:
        inputs, targets = batch(step)
        loss = self.pipe.step(inputs if self.is_first else None, targets if self.is_last else None)
        return None if loss is None else float(loss)

    def differences(self, want: dict[str, Tensor], scale: dict[str, Tensor]) -> dict[str, float]:
        """Of this rank's parts of all gradients, the largest difference as a part of ``scale``'s largest."""
        found = {}
        for module in self.modules:
            shards = shards_of(module)
            for name, param in module.named_parameters():
                assert param.grad is not None
                part = want[name]
                if name in shards:
                    shard, comm = shards[name]
                    part = shard.take(part, comm.world_size, comm.rank)
                difference = (param.grad - part).abs().flatten().tolist()
                found[name] = max(difference, default=0.0) / float(scale[name].max())
        return found


def against_one_process(
    comm: Communicator, name: str, pp: int, sequence_parallel: bool
) -> tuple[list[float], list[float], dict[str, float], float, float]:
    """Losses here and there, differences of gradients, norms here and there, of steps that add up."""
    reference = Reference(torch.float64)
    with pycomm.Mesh(comm, pp=pp, tp=comm.world_size // pp) as mesh:
        cut = Cut(mesh, name, sequence_parallel)
        losses = [cut.step(step) for step in range(NUM_STEPS)]
        want_losses = [reference.step(step) for step in range(NUM_STEPS)]
        want = {key: param.grad for key, param in reference.params.items()}
        scale = reference.abs_sums
        scale[TIED[0]] = scale[TIED[1]] = scale[TIED[0]] + scale[TIED[1]]
        differences = cut.differences(want, scale)
        norm = pycomm.clip_grad_norm_(cut.pipe.parameters(), 1e9, mesh)
        one_copy = [param for key, param in reference.params.items() if key != TIED[1]]
        return (
            [loss for loss in losses if loss is not None],
            want_losses,
            differences,
            float(norm),
            float(pycomm.clip_grad_norm_(one_copy, 1e9)),
        )


@pytest.mark.parametrize(
    ("name", "world_size", "pp", "sequence_parallel"),
    [*((name, 4, 2, True) for name in NAMES), ("1f1b", 4, 2, False), ("zb_v", 4, 2, False), ("zb_h1", 3, 1, False)],
)
def test_losses_gradients_and_norm_are_those_of_one_process(
    pool: Pool, name: str, world_size: int, pp: int, sequence_parallel: bool
) -> None:
    """In fp64, where sums of fewer than 1,000 terms are within 1,000 * 1.1e-16 of the sum of their magnitudes."""
    for losses, want, differences, norm, want_norm in pool.run(
        world_size, against_one_process, name, pp, sequence_parallel
    ):
        assert differences
        assert max(differences.values()) <= 1e-11
        assert all(abs(a - b) <= 1e-11 for a, b in zip(losses, want, strict=bool(losses)))
        assert abs(norm - want_norm) <= 1e-11 * want_norm


def train(comm: Communicator, name: str, sequence_parallel: bool) -> list[float]:
    with pycomm.Mesh(comm, pp=2, tp=2) as mesh:
        cut = Cut(mesh, name, sequence_parallel)
        optimizer = torch.optim.AdamW(cut.pipe.parameters(), lr=1e-2)
        losses = []
        for step in range(20):
            optimizer.zero_grad()
            losses.append(cut.step(step % 2))
            optimizer.step()
        return [loss for loss in losses if loss is not None]


def curve(nudged: float = 0.0) -> list[float]:
    """The same training in one process, every weight changed by ``nudged`` of itself before every step."""
    reference = Reference(torch.float64)
    params = reference.params
    optimizer = torch.optim.AdamW([param for key, param in params.items() if key != TIED[1]], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(20):
        nudge(params.values(), nudged, generator)
        params[TIED[1]].data.copy_(params[TIED[0]].data)
        optimizer.zero_grad()
        losses.append(reference.step(step % 2))
        optimizer.step()
    return losses


@pytest.mark.parametrize(("name", "sequence_parallel"), [("1f1b", True), ("zb_v", False)])
def test_twenty_steps_have_the_loss_curve_of_one_process(pool: Pool, name: str, sequence_parallel: bool) -> None:
    """Within what changes of every weight by 1e-13 of itself in every step, a thousand roundings, make of it."""
    want = curve()
    bound = largest_difference(want, curve(1e-13))
    assert 0 < bound < 1e-6
    results = [losses for losses in pool.run(4, train, name, sequence_parallel) if losses]
    assert len(results) == 2
    for losses in results:
        assert largest_difference(losses, want) <= bound


def copies(comm: Communicator) -> None:
    whole = model()
    parallelize(whole, comm)
    other = copy.deepcopy(whole)
    for made in (other, copy.deepcopy(whole).double(), copy.deepcopy(whole).to("meta").to_empty(device="cpu")):
        assert made.blocks[0].mlp.up.comm is comm
        named = made.named_parameters(remove_duplicate=False)
        parts = {name for name, param in named if getattr(param, "is_part", False)}
        assert parts == set(shards_of(made))
    other.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()}, assign=True)
    assert isinstance(other.blocks[0].mlp.up.weight, nn.Parameter)
    assert other.blocks[0].mlp.up.weight.is_part


def test_parts_are_known_as_such_after_copies_and_casts(pool: Pool) -> None:
    pool.run(2, copies)
