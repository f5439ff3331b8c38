"""Models, batches and references that the tests of the pipeline's runtime share, built from seeds in every process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


TIED = ("token_embedding.weight", "unembedding.weight")


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

    def of_microbatches(self, step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Weighted loss and gradients of each micro-batch."""
        inputs, targets = (part.tensor_split(MICROBATCHES) for part in batch(step))
        for x, y in zip(inputs, targets, strict=True):
            loss = next_token_loss(self.whole(x), y) * (len(x) / ROWS)
            grads = torch.autograd.grad(loss, list(self.params.values()))
            yield loss.detach(), dict(zip(self.params, grads, strict=True))

    def step(self, step: int = 0, *, tied: bool = True) -> float:
        total = torch.tensor(0.0, dtype=self.whole.final_norm.weight.dtype)
        embedding, output = self.params["token_embedding.weight"], self.params["unembedding.weight"]
        output.grad = None
        for loss, grads in self.of_microbatches(step):
            total = total + loss
            for name, param in self.params.items():
                param.grad = grads[name] if param.grad is None else param.grad + grads[name]
                self.abs_sums[name] += grads[name].abs()
        assert embedding.grad is not None
        assert output.grad is not None
        if tied:
            embedding.grad = output.grad = embedding.grad + output.grad
        return float(total)


@torch.no_grad()
def nudge(params: Iterable[Tensor], part: float, generator: torch.Generator) -> None:
    """Change every element by ``part`` of itself, up or down: what rounding does to training, only more."""
    for param in params:
        signs = 2 * torch.randint(2, param.shape, generator=generator) - 1
        param.addcmul_(param, signs.to(param.dtype), value=part)


def largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


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
