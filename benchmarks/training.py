"""What benchmarks/data_parallel.py runs on every rank: one model, trained in turn by every way of data parallelism.

All contenders live in the same processes and take turns, so that a slow minute of the machine hits all of them. For
memory a process has one contender only.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pycomm
from pycomm.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(
    vocab_size=4096, max_seq=128, num_layers=6, num_heads=8, hidden=256, positions="learned", tie_embeddings=False
)
SMALL = GPTConfig(vocab_size=256, max_seq=128, num_layers=1, num_heads=2, hidden=32, tie_embeddings=False)
BATCH = 4  # sequences a rank
LR = 3e-4


@dataclass
class Contender:
    """A model with its way of making a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    exposed_s: Callable[[], float | None] = lambda: None  # as the library counts it itself

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        logits = self.model(tokens)
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        self.optimizer.step()


def torch_adamw(model: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)


def build(name: str, comm: pycomm.Communicator, config: GPTConfig, bucket_mb: float) -> Contender:
    """The contender ``name`` with a fresh model. Collective."""
    model = GPT(config, seed=0)
    if name.startswith("none"):
        return Contender(model, torch_adamw(model, fused=name == "none-fused"))
    if name == "ddp":
        wrapped = DistributedDataParallel(model, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
        return Contender(wrapped, torch_adamw(wrapped))
    if name == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        sharded = fully_shard(model)
        return Contender(sharded, torch_adamw(sharded))
    kind, _, option = name.partition("/")
    ddp = pycomm.DataParallel(model, comm, bucket_mb=bucket_mb, overlap=option != "after")
    optimizer: torch.optim.Optimizer
    if kind == "pycomm":
        optimizer = torch_adamw(ddp)
    else:
        optimizer = pycomm.ShardedAdamW(ddp, lr=LR, stage=int(kind.removeprefix("zero")))
    return Contender(ddp, optimizer, lambda: ddp.exposed_comm_s)


def batch(config: GPTConfig, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shape = (2, BATCH, config.max_seq)
    tokens, targets = torch.randint(config.vocab_size, shape, generator=generator)
    return tokens, targets


def time_turns(
    contenders: dict[str, Contender], rank: int, turns: int, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds a step, by contender and turn; a turn is ``steps`` steps after a barrier."""
    tokens, targets = batch(CONFIG, rank)
    for contender in contenders.values():  # buckets are rebuilt, states allocated
        for _ in range(3):
            contender.step(tokens, targets)
    result: dict[str, dict[str, list[float]]] = {name: {"step_s": [], "waited_s": []} for name in contenders}
    for turn in range(turns):
        order = list(contenders.items())
        order = order[turn % len(order) :] + order[: turn % len(order)]
        for name, contender in order:
            contender.step(tokens, targets)  # its memory is in the caches again
            dist.barrier()
            waited = 0.0
            start = time.perf_counter()
            for _ in range(steps):
                contender.step(tokens, targets)
                waited += contender.exposed_s() or 0.0
            result[name]["step_s"].append((time.perf_counter() - start) / steps)
            result[name]["waited_s"].append(waited / steps)
    return result


def model_state_bytes(name: str, comm: pycomm.Communicator, bucket_mb: float) -> dict[str, int]:
    """Proportional set size that this rank's parameters, gradients and optimizer states take, between two steps."""
    with _alone(lambda: build(name, comm, SMALL, bucket_mb), SMALL, comm.rank):
        pass  # loads what the contender loads
    before = _pss_bytes()
    with _alone(lambda: build(name, comm, CONFIG, bucket_mb), CONFIG, comm.rank) as contender:
        after = _pss_bytes()
        pool = 0
        if isinstance(contender.model, pycomm.DataParallel):
            pool = contender.model.gradient_bytes
        return {
            "bytes": after - before,
            "gradient_bytes": pool,
            "params": sum(p.numel() for p in GPT(CONFIG).parameters()),
        }


@contextmanager
def _alone(make: Callable[[], Contender], config: GPTConfig, rank: int) -> Iterator[Contender]:
    contender = make()
    for _ in range(3):
        contender.step(*batch(config, rank))
    yield contender
    dist.barrier()


def _pss_bytes() -> int:
    """After giving freed memory back: malloc keeps activations for the next step otherwise. Collective."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    dist.barrier()
    rollup = Path("/proc/self/smaps_rollup").read_text()
    dist.barrier()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
