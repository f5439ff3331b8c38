"""Models, batches and references that the tests of the pipeline's runtime share, built from seeds in every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pycomm import Communicator
from pycomm.models import GPT, GPTConfig, gpt_stages, next_token_loss
from pycomm.pipeline import Pipeline, Schedule, build

CONFIG = GPTConfig(vocab_size=53, max_seq=8, num_layers=6, num_heads=2, hidden=16)
ROWS, MICROBATCHES = 9, 4  # not divisible: the first micro-batch is larger
CHUNKS = {"interleaved_1f1b": 2}


def model(dtype: torch.dtype = torch.float32) -> GPT:
    return GPT(CONFIG, seed=3).to(dtype)


def batch(step: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(CONFIG.vocab_size, (rows, CONFIG.max_seq + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def schedule_of(name: str, num_ranks: int, num_microbatches: int = MICROBATCHES) -> Schedule:
    return build(name, num_ranks, num_microbatches, CHUNKS.get(name, 1))


def uneven_cuts(num_stages: int) -> list[range]:
    """As many layers as possible in the first stage, one in each other."""
    num_layers = CONFIG.num_layers + 2
    first = num_layers - num_stages + 1
    return [range(first), *(range(layer, layer + 1) for layer in range(first, num_layers))]


def pipeline(
    comm: Communicator, whole: GPT, schedule: Schedule, cuts: Sequence[range] | None = None, **options: bool
) -> tuple[Pipeline, dict[str, torch.nn.Parameter]]:
    """A pipeline of ``whole``, and this rank's parameters by the names that they have in the whole model."""
    stages = gpt_stages(whole, comm, schedule.rank_of, cuts)
    params = {name: param for stage in stages for name, param in stage.module.named_parameters()}
    return Pipeline(stages, schedule, next_token_loss, **options), params


def on_this_rank(comm: Communicator, schedule: Schedule, step: int = 0) -> tuple[Tensor | None, Tensor | None]:
    inputs, targets = batch(step)
    first, last = schedule.rank_of[0], schedule.rank_of[-1]
    return inputs if comm.rank == first else None, targets if comm.rank == last else None


class Reference:
    """One process that goes through the same micro-batches in the same order, gradients adding up over steps.

    The embedding and the output projection are two parameters here. A pipeline of several stages keeps the old sum and
    the embedding's gradients in one copy and the output's in the other, and adds the two at the end of a step. So does
    this; all else happens in one order anyway. So the bits are the same.

    Attributes:
        abs_sums: of each parameter, the sum of the absolute values of all gradients that were added.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.whole = model(dtype)
        self.whole.unembedding.weight = torch.nn.Parameter(self.whole.token_embedding.weight.detach().clone())
        self.params = dict(self.whole.named_parameters())
        self.abs_sums = {name: torch.zeros_like(param) for name, param in self.params.items()}

    def step(self, step: int = 0, *, tied: bool = True) -> float:
        inputs, targets = (part.tensor_split(MICROBATCHES) for part in batch(step))
        total = torch.tensor(0.0, dtype=self.whole.final_norm.weight.dtype)
        embedding, output = self.params["token_embedding.weight"], self.params["unembedding.weight"]
        output.grad = None
        for x, y in zip(inputs, targets, strict=True):
            loss = next_token_loss(self.whole(x), y) * (len(x) / ROWS)
            total = total + loss.detach()
            grads = torch.autograd.grad(loss, list(self.params.values()))
            for (name, param), grad in zip(self.params.items(), grads, strict=True):
                param.grad = grad if param.grad is None else param.grad + grad
                self.abs_sums[name] += grad.abs()
        assert embedding.grad is not None
        assert output.grad is not None
        if tied:
            embedding.grad = output.grad = embedding.grad + output.grad
        return float(total)


def gradients(params: Iterator[tuple[str, torch.nn.Parameter]]) -> dict[str, Tensor]:
    return {name: param.grad.detach().clone() for name, param in params if param.grad is not None}


@contextmanager
def own_communicator(comm: Communicator) -> Iterator[Communicator]:
    """A communicator that a test may break, since the pool's is used by later tests."""
    own = comm.split(0)
    assert own is not None
    try:
        yield own
    finally:
        own.close()
