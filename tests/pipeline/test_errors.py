"""What a pipeline refuses, and who hears of what goes wrong in the middle of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycomm
from pycomm import Communicator
from pycomm.errors import MismatchError, PeerLostError, PycommError, ScheduleError
from pycomm.pipeline import Action, Pipeline, PipelineStage, Schedule, build
from tests.host.test_faults import SOON_S
from tests.pipeline.helpers import own_communicator
from tests.pool import Pool
from tests.processes import Ranks

X = torch.arange(12.0).view(6, 2)


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def built(comm: Communicator, module: nn.Module | None = None, loss: Any = squared, **options: Any) -> Pipeline:
    stage = PipelineStage(module or nn.Linear(2, 2), comm.rank, comm.world_size, comm)
    return Pipeline(stage, build("1f1b", comm.world_size, 3), loss, **options)


def refused(comm: Communicator) -> None:
    stage = PipelineStage(nn.Linear(2, 2), comm.rank, 2, comm)
    computations = Schedule([[Action("F", r, 0), Action("BW", r, 0)] for r in range(2)], [0, 1], 1)
    with pytest.raises(ScheduleError, match="rank 0: RECV_B of stage 0, micro-batch 0: found 0 times"):
        Pipeline(stage, computations, squared)  # not lowered
    broken = build("zb_h1", 2, 4)
    broken.ranks[1].remove(next(action for action in broken.ranks[1] if action.kind == "W"))
    with pytest.raises(ScheduleError, match="rank 1: W of stage 1"):
        Pipeline(stage, broken, squared)
    with pytest.raises(ValueError, match=rf"puts stages \[{comm.rank}, {3 - comm.rank}\] on rank {comm.rank}"):
        Pipeline([PipelineStage(nn.Linear(2, 2), comm.rank, 4, comm)], build("zb_v", 2, 4), squared)
    with pytest.raises(ValueError, match="model of 2, the schedule has 4"):
        Pipeline(stage, build("zb_v", 2, 4), squared)
    with pytest.raises(ValueError, match=r"for 3 rank\(s\), the communicator has 2"):
        Pipeline(stage, build("1f1b", 3, 4), squared)
    with pytest.raises(ValueError, match="has no stage"):
        Pipeline([], build("1f1b", 2, 4), squared)
    with pytest.raises(ValueError, match="between 0 and num_stages - 1 = 1"):
        PipelineStage(nn.Linear(2, 2), 2, 2, comm)
    with pytest.raises(ValueError, match="'w' is not a parameter of stage 0"):
        PipelineStage(nn.Linear(2, 2), 0, 2, comm, shared={"w": nn.Parameter(torch.ones(1))})
    with pytest.raises(MismatchError, match=r"rank\(s\) \[1\] another than rank 0"):
        Pipeline(stage, build("1f1b", 2, 3 + comm.rank), squared)
    with pytest.raises(MismatchError, match="copies of a shared parameter differ"):
        module = nn.Linear(2, 2 + comm.rank)
        shared = PipelineStage(module, comm.rank, 2, comm, shared={"w": module.weight})
        Pipeline(shared, build("1f1b", 2, 3), squared)
    pipe = built(comm)
    for bad in (None, torch.zeros(2, 2), torch.tensor(1.0)):  # only one micro-batch is missing: nothing is sent
        with pytest.raises(ValueError, match="inputs" if comm.rank == 0 else "targets"):
            pipe.step(bad, bad)
    assert (pipe.step(X, X) is None) == (comm.rank == 0)  # and all goes on


def test_what_does_not_fit_is_refused_before_anything_is_sent(pool: Pool) -> None:
    pool.run(2, refused)


class OtherShape(nn.Linear):
    """Its second micro-batch of a step is transposed."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)[:, :1] if self.calls % 3 == 2 else super().forward(x)


class TwoTensors(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (x, x)  # type: ignore[return-value]


class Bits(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach().view(torch.uint8).view(torch.bits8)


class Raises(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("planted")


def vector_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square()


FAILURES: dict[str, tuple[int, Callable[[], nn.Module], Any, type[Exception], str]] = {
    "another shape": (0, lambda: OtherShape(2, 2), squared, ValueError, "output of stage 0, micro-batch 1,.*keeps one"),
    "two tensors": (1, lambda: TwoTensors(2, 2), squared, TypeError, "output of stage 1, micro-batch 0, is tuple"),
    "a dtype": (1, lambda: Bits(2, 2), squared, ValueError, "bits8"),
    "an exception": (2, lambda: Raises(2, 2), squared, KeyError, "planted"),
    "no mean": (2, lambda: nn.Linear(2, 2), vector_loss, ValueError, "must return one number"),
}


def fails_on_one_rank(comm: Communicator, what: str, ordered: bool) -> tuple[str, str]:
    rank, module, loss, kind, message = FAILURES[what]
    with own_communicator(comm) as own:
        pipe = built(own, module() if own.rank == rank else nn.Linear(2, 2), loss, ordered=ordered)
        with pytest.raises((kind, PeerLostError)) as caught:
            pipe.step(X, X)
        with pytest.raises(PycommError):  # it cannot be used any more, and says so
            pipe.step(X, X)
        if own.rank == rank:
            assert isinstance(caught.value, kind)
            caught.match(message)
            return "own", str(caught.value)
        assert isinstance(caught.value, PeerLostError)
        assert caught.value.lost_ranks == [rank]
        return "peer", str(caught.value)


@pytest.mark.parametrize("ordered", [False, True], ids=["beside", "ordered"])
@pytest.mark.parametrize("what", FAILURES)
def test_an_error_in_a_step_is_told_to_every_rank(pool: Pool, what: str, ordered: bool) -> None:
    results = pool.run(3, fails_on_one_rank, what, ordered)
    rank = FAILURES[what][0]
    assert [kind for kind, _ in results] == ["own" if r == rank else "peer" for r in range(3)]
    reason = results[rank][1]
    assert all(reason.strip("'")[:60] in message for _, message in results)


def rows_differ(comm: Communicator) -> None:
    with own_communicator(comm) as own:
        pipe = built(own)
        with pytest.raises((ValueError, PeerLostError), match="micro-batch 0 has 2 rows of inputs and 3 of targets"):
            pipe.step(X, torch.zeros(9, 2))


def test_inputs_and_targets_of_different_lengths(pool: Pool) -> None:
    pool.run(2, rows_differ)


def aliases(comm: Communicator) -> list[Tensor]:
    """Stages that return their input, or hand on its gradient: a slot must not be used after its release."""
    schedule = build("zb_v", comm.world_size, 8)
    modules = [nn.Identity(), nn.Linear(2, 2, bias=False), nn.Flatten(1), nn.Identity()]
    stages = []
    with torch.no_grad():
        modules[1].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    for stage, rank in enumerate(schedule.rank_of):
        if rank == comm.rank:
            stages.append(PipelineStage(modules[stage], stage, 4, comm))
    pipe = Pipeline(stages, schedule, squared)
    x = torch.arange(32.0).view(16, 2)
    for _ in range(3):
        modules[1].zero_grad()
        pipe.step(x, x * 2)
    losses = [pipe.evaluate(x, x * 2) for _ in range(2)]
    return [modules[1].weight.grad] if comm.rank == schedule.rank_of[1] else losses


def test_slots_are_not_used_after_their_release(pool: Pool) -> None:
    results = pool.run(2, aliases)
    x = torch.arange(32.0).view(16, 2)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    total = torch.tensor(0.0)
    for part in x.tensor_split(8):
        loss = squared(part @ weight.t(), part * 2) * (2 / 16)
        loss.backward()
        total = total + loss.detach()
    assert torch.equal(results[1][0], weight.grad)
    assert [float(loss) for loss in results[0]] == [float(total)] * 2


class FullSize(nn.Module):
    """Autograd makes ``.grad`` of such a parameter a view of the gradient that comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.view(2, 2)


def gradient_in_a_slot(comm: Communicator, name: str) -> list[Tensor]:
    module = FullSize()
    stage = PipelineStage(module, comm.rank, comm.world_size, comm)
    pipe = Pipeline(stage, build(name, comm.world_size, 3), squared)
    for step in range(2):  # the first without slots
        module.zero_grad()
        pipe.step(X, X + 1 + step)
    return [module.shift.grad]


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_gradients_do_not_stay_in_slots(pool: Pool, name: str) -> None:
    results = pool.run(3, gradient_in_a_slot, name)
    # loss = mean over 12 elements of (-2) ** 2; each element of shift meets three of them: 3 * 2 * (-2) / 12.
    assert all(torch.equal(grad, torch.full((2, 2), -1.0)) for (grad,) in results)


def endless(comm: Communicator, connection: Connection) -> None:
    pipe = built(comm)
    for step in range(100_000_000):
        pipe.step(X, X)
        if step == 5:
            connection.send("running")


@pytest.mark.parametrize("victim", [0, 3])
def test_a_killed_rank_is_named_on_every_survivor(tmp_path: Path, victim: int) -> None:
    with Ranks(tmp_path, 4, endless) as ranks:
        for connection in ranks.connections:
            assert connection.recv() == "running"
        killed_at = time.monotonic()
        os.kill(ranks.pids[victim], signal.SIGKILL)
        for rank in {0, 1, 2, 3} - {victim}:
            (kind, message, fields), _ = ranks.result(rank)
            assert time.monotonic() - killed_at < SOON_S
            assert kind == "PeerLostError"
            assert fields["lost_ranks"] == [victim]
            assert f"rank {victim}" in message


def test_one_process_alone() -> None:
    with pycomm.init() as comm:
        module = nn.Linear(2, 2)
        pipe = Pipeline(PipelineStage(module, 0, 1, comm), build("gpipe", 1, 3), squared)
        loss = pipe.step(X, X)
        assert loss is not None
        want = sum(squared(module(part), part) / 3 for part in X.tensor_split(3))
        assert float(loss) == pytest.approx(float(want.detach()), rel=1e-6)
        assert len(pipe.timeline().ranks[0]) == 6


def frozen_stage(comm: Communicator, name: str) -> Tensor | None:
    """The middle stage trains nothing and the last one ignores its input: every stage still gets a gradient, zeros."""
    module: nn.Module = nn.Linear(2, 2)
    if comm.rank == 1:
        module.requires_grad_(False)
    if comm.rank == 2:
        module = Ignores()
    stage = PipelineStage(module, comm.rank, comm.world_size, comm)
    Pipeline(stage, build(name, comm.world_size, 3), squared).step(X, X)
    return next(module.parameters()).grad


class Ignores(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.ones_like(x))


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_stages_that_train_nothing(pool: Pool, name: str) -> None:
    first, middle, last = pool.run(3, frozen_stage, name)
    assert torch.equal(first, torch.zeros(2, 2))
    assert middle is None
    assert float(last.abs().sum()) > 0
