"""The training loop: batch, forward, loss, backward, optimizer step, and again.

Every rank runs the same steps on its share of the global batch; ``DataParallel`` averages the gradients while backward
computes them. With one rank the same code runs, and nothing is sent. The loop writes no file and prints nothing: it
hands each step's numbers to ``on_step`` and asks ``save`` for checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace

import torch

from pycomm.communicator import Communicator
from pycomm.data_parallel import DataParallel, ShardedAdamW, clip_grad_norm_
from pycomm.errors import PycommError
from pycomm.models.gpt import GPT, next_token_loss
from pycomm.pretrain.config import NonFiniteError, OptimConfig, PretrainConfig, printable
from pycomm.pretrain.data import Corpus
from pycomm.pretrain.sampler import Sampler, gather


@dataclass(frozen=True)
class StepRecord:
    """Numbers of one step, equal on all ranks except for the times.

    Attributes:
        step: from 1.
        loss: mean cross-entropy over the global batch, in nats a token, before the step's update.
        lr: learning rate of the update.
        grad_norm: norm of the averaged gradient before clipping.
        tokens_per_s: tokens of the global batch over the step's duration.
        mfu: share of the devices' peak that the model's arithmetic used; None if no peak is known.
        exposed_comm_ms: milliseconds in which backward waited for communication, mean over ranks.
        val_loss: mean cross-entropy of held-out text after the update; None if it was not measured.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    mfu: float | None
    exposed_comm_ms: float
    val_loss: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """The record as a JSON object; ``val_loss`` is there only when it was measured."""
        row: dict[str, float | None] = asdict(self)
        if self.val_loss is None:
            del row["val_loss"]
        return row


@dataclass
class TrainState:
    """What a step changes: the model's weights, the optimizer's moments, and the number of steps done."""

    model: GPT
    ddp: DataParallel
    optimizer: ShardedAdamW
    step: int = 0


@contextmanager
def abort_on_error(comm: Communicator) -> Iterator[None]:
    """Tells the other ranks at once when this one fails in the block, so that none waits for its timeout.

    Errors of pycomm itself and NonFiniteError are not told on: the others have them already.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, PycommError | NonFiniteError):
            comm.abort(printable(f"{type(error).__name__}: {error}"))
        raise


def build_state(comm: Communicator, config: PretrainConfig) -> TrainState:
    """The untrained model with its wrapper and optimizer; the same on every rank. Collective."""
    model = GPT(config.model, seed=config.seed)
    ddp = DataParallel(model, comm, bucket_mb=config.run.bucket_mb)
    return TrainState(model, ddp, build_optimizer(ddp, config.optim, config.zero))


def build_optimizer(ddp: DataParallel, config: OptimConfig, stage: int) -> ShardedAdamW:
    """AdamW; matrices decay, vectors (norms, biases) do not. Collective.

    Ref: "Decoupled Weight Decay Regularization" (2019).
    """
    trained = [p for p in ddp.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return ShardedAdamW(
        ddp, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, stage=stage, param_groups=groups
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of ``step`` (from 1) of ``steps``: a linear rise, then half a cosine down to the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    lowest = config.lr * config.min_lr_ratio
    return lowest + (config.lr - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train(
    comm: Communicator,
    config: PretrainConfig,
    corpus: Corpus,
    state: TrainState,
    *,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    save: Callable[[TrainState], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Run the steps after ``state.step`` up to ``config.steps``. Collective.

    Args:
        comm: all ranks of the run.
        config: a valid configuration, equal on all ranks.
        corpus: equal on all ranks.
        state: is trained in place.
        on_step: called on every rank after each step.
        save: called on every rank when a checkpoint is due, after ``on_step``.
        stop: asked once a step; when it says True on any rank, all ranks save and return after the same step.

    Returns:
        True after the last step, False after a stop.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; the weights are those before the bad update.
        PeerLostError: another rank failed. If this rank fails, its error is passed on and the others are told.
    """
    sampler = Sampler(corpus.train, config.model.max_seq, config.global_batch, config.seed)
    with abort_on_error(comm):
        while state.step < config.steps:
            record, stopping = train_step(comm, config, state, sampler, stop())
            last = state.step == config.steps
            if last or state.step % config.run.val_every == 0:
                record = replace(record, val_loss=validate(comm, config, corpus, state.model))
            on_step(record)
            if last or stopping or state.step % config.run.save_every == 0:
                save(state)
            if stopping and not last:
                return False
    return True


def train_step(
    comm: Communicator, config: PretrainConfig, state: TrainState, sampler: Sampler, stop: bool
) -> tuple[StepRecord, bool]:
    """One optimizer step on the next global batch; returns its record and whether any rank wants to stop."""
    began = time.perf_counter()
    step = state.step + 1
    loss_sum = forward_backward(comm, config, state.ddp, sampler, step)
    # One small message carries all that ranks must agree on. fp64, so that the mean of equal losses is exact.
    shared = torch.tensor([loss_sum, state.ddp.exposed_comm_s, float(stop)], dtype=torch.float64)
    comm.all_reduce(shared)
    loss, exposed_s, stopping = (shared / comm.world_size).tolist()
    clip = config.optim.clip if config.optim.clip > 0 else math.inf
    grad_norm = float(clip_grad_norm_(state.ddp, clip))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(
            f"step {step}: the loss is {loss} and the gradient's norm {grad_norm}; training stopped before the update, "
            "and the last checkpoint is kept (a lower --optim.lr or --optim.clip may help)"
        )
    lr = learning_rate(step, config.steps, config.optim)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.step = step
    tokens_per_s = config.global_batch * config.model.max_seq / (time.perf_counter() - began)
    mfu = None
    if config.run.peak_tflops is not None:
        flops_per_s = tokens_per_s * state.model.flops_per_token(config.model.max_seq)
        mfu = flops_per_s / (config.run.peak_tflops * 1e12 * comm.world_size)
    record = StepRecord(step, loss, lr, grad_norm, tokens_per_s, mfu, exposed_s * 1e3)
    return record, stopping > 0


def forward_backward(
    comm: Communicator, config: PretrainConfig, ddp: DataParallel, sampler: Sampler, step: int
) -> float:
    """Compute the gradient of the global batch's mean loss; returns the mean loss of this rank's share."""
    accumulation = config.accumulation(comm.world_size)
    first = comm.rank * accumulation * config.micro_batch
    ddp.zero_grad()  # to None: moving a fresh gradient into its bucket is cheaper than zeroing and adding to it
    loss_sum = torch.zeros((), dtype=torch.float64)
    for index in range(accumulation):
        begin = first + index * config.micro_batch
        tokens, targets = sampler.batch(step, range(begin, begin + config.micro_batch))
        # Gradients accumulate locally and the last micro-batch's backward sends them, unless their memory is divided.
        sends = index == accumulation - 1 or ddp.averages_every_backward
        with nullcontext() if sends else ddp.no_sync():
            loss = next_token_loss(ddp(tokens), targets)
            (loss / accumulation).backward()
        loss_sum += loss.detach()
    return float(loss_sum) / accumulation


@torch.no_grad()
def validate(comm: Communicator, config: PretrainConfig, corpus: Corpus, model: GPT) -> float:
    """Mean cross-entropy of held-out sequences, spread evenly over the text. Collective; equal on all ranks."""
    seq = config.model.max_seq
    available = (len(corpus.held_out) - 1) // seq
    count = min(config.data.val_sequences, available)
    starts = [index * available // count * seq for index in range(count)]
    mine = starts[comm.rank :: comm.world_size]
    total = torch.zeros(1, dtype=torch.float64)
    for begin in range(0, len(mine), config.micro_batch):
        tokens, targets = gather(corpus.held_out, mine[begin : begin + config.micro_batch], seq)
        total += next_token_loss(model(tokens), targets) * len(tokens)
    comm.all_reduce(total)
    return float(total) / count
