"""Pipelines on NCCL, over the stand-in: what travels, and what must keep its shape."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from pycomm import Communicator
from pycomm.backends.nccl import NcclBackend
from pycomm.errors import PeerLostError
from pycomm.pipeline import Pipeline, PipelineStage, build
from tests.nccl.helpers import read_by_the_host, run
from tests.pool import Pool

WIDTH, NUM_MICROBATCHES = 6, 4


def layers(num_stages: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(num_stages)]


def batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y


def pipeline(comm: Communicator, name: str) -> tuple[Pipeline, dict[int, nn.Module]]:
    schedule = build(name, comm.world_size, NUM_MICROBATCHES, 2 if name == "interleaved_1f1b" else 1)
    whole = layers(schedule.num_stages)
    mine = {stage: whole[stage] for stage, rank in enumerate(schedule.rank_of) if rank == comm.rank}
    stages = [PipelineStage(module, stage, schedule.num_stages, comm) for stage, module in mine.items()]
    return Pipeline(stages, schedule, nn.functional.mse_loss), mine


def given(pipe: Pipeline, mine: dict[int, nn.Module], x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return x if 0 in mine else None, y if pipe._num_stages - 1 in mine else None


def steps_like_one_process(comm: Communicator, name: str, rows: int) -> None:
    x, y = batch(rows)
    with read_by_the_host():
        pipe, mine = pipeline(comm, name)
        messages: list[torch.dtype] = []
        exchange = NcclBackend.exchange

        def seen(self, pending, *args):
            messages.extend(tensor.dtype for _, tensor in pending)
            return exchange(self, pending, *args)

        with patch.object(NcclBackend, "exchange", seen):
            pipe.step(*given(pipe, mine, x, y))
            had_tokens = messages.count(torch.int64)
            assert had_tokens == messages.count(torch.float64) > 0
            loss = pipe.step(*given(pipe, mine, x, y))
            assert messages.count(torch.int64) == had_tokens  # shapes are known
            assert messages.count(torch.float64) == 2 * had_tokens
            evaluated = [pipe.evaluate(*given(pipe, mine, x, y)) for _ in range(2)]
    whole = layers(pipe._num_stages)
    want = nn.functional.mse_loss(nn.Sequential(*whole)(x), y)
    (2 * want).backward()  # gradients of two steps add up
    for stage, module in mine.items():
        for got, param in zip(module.parameters(), whole[stage].parameters(), strict=True):
            # Micro-batches add what one batch sums at once: a few roundings of fp64.
            torch.testing.assert_close(got.grad, param.grad, rtol=1e-13, atol=1e-15)
    for value in (loss, *evaluated):
        assert (value is None) == (pipe._num_stages - 1 not in mine)
        assert value is None or torch.allclose(value, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v"])
@pytest.mark.parametrize("size", [2, 3])
def test_steps_like_one_process(pool: Pool, standin: Path, tmp_path: Path, size: int, name: str) -> None:
    run(pool, size, standin, tmp_path, steps_like_one_process, name, 2 * NUM_MICROBATCHES + 1)


def a_batch_of_another_shape(comm: Communicator) -> None:
    with read_by_the_host():
        pipe, mine = pipeline(comm, "1f1b")
        pipe.step(*given(pipe, mine, *batch(8)))
        with pytest.raises(
            (ValueError, PeerLostError), match=r"SEND_F of stage 0, micro-batch 0 .* of 3 rows"
        ) as caught:
            pipe.step(*given(pipe, mine, *batch(12)))
        assert isinstance(caught.value, ValueError if comm.rank == 0 else PeerLostError)
    comm.barrier = lambda: None  # type: ignore[method-assign]  # it cannot be used any more


def test_a_batch_of_another_shape(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 2, standin, tmp_path, a_batch_of_another_shape)
