"""What benchmarks/data_parallel.py runs on every rank: one model, trained in turn by every way of data parallelism.

For time, all contenders live in the same processes and take turns, so that a slow minute of the machine hits all of
them. For memory, a process has one contender only.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

import pycomm
from pycomm.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(
    vocab_size=4096, max_seq=128, num_layers=6, num_heads=8, hidden=256, positions="learned", tie_embeddings=False
)
# For memory: large enough for fixed costs, such as the transport's staging, not to count.
LARGE = GPTConfig(
    vocab_size=4096, max_seq=128, num_layers=8, num_heads=8, hidden=512, positions="learned", tie_embeddings=False
)
SMALL = GPTConfig(vocab_size=256, max_seq=128, num_layers=1, num_heads=2, hidden=32, tie_embeddings=False)
BATCH = 4  # sequences a rank
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WARM_UP = 3  # steps
# Losses after WARM_UP steps, between contenders that add gradients in another order. AdamW moves a weight by at most
# about lr a step, whatever the rounding of its gradient; 4 steps of 1e-4 move the loss by less than this.
LOSS_TOLERANCE = 1e-3


@dataclass
class Contender:
    """A model with its way of making a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    exposed_s: Callable[[], float] = lambda: 0.0  # as the library counts it itself
    backward: Callable[[Tensor], object] = torch.Tensor.backward

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """One training step; the loss on this rank."""
        if self.optimizer is None:
            self.model.zero_grad()
        else:
            self.optimizer.zero_grad()
        logits = self.model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.backward(loss)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()


def torch_adamw(model: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **ADAMW, fused=fused)


def build(name: str, comm: pycomm.Communicator, config: GPTConfig, bucket_mb: float) -> Contender:
    """The contender ``name`` with a fresh model. Collective."""
    model = GPT(config, seed=0)
    kind, _, option = name.partition("/")
    if kind == "compute":
        return Contender(model, None)
    if kind == "none":
        return Contender(model, torch_adamw(model, fused=option == "fused"))
    if kind == "ddp":
        backend, _, view = option.partition("-")
        wrapped = DistributedDataParallel(
            model, process_group=_group(backend), bucket_cap_mb=bucket_mb, gradient_as_bucket_view=bool(view)
        )
        if backend == "fake":  # whose futures DDP does not take
            wrapped.register_comm_hook(None, noop_hook)
        return Contender(wrapped, torch_adamw(wrapped))
    if kind == "fsdp2":
        sharded = _fsdp2(model, option)
        return Contender(sharded, torch_adamw(sharded))
    if kind == "deepspeed":
        return _deepspeed(model)
    ddp = pycomm.DataParallel(model, comm, bucket_mb=bucket_mb, overlap=option != "after")
    stage = kind.removeprefix("zero")
    if kind == "pycomm":
        return Contender(ddp, torch_adamw(ddp), lambda: ddp.exposed_comm_s)
    optimizer = pycomm.ShardedAdamW(ddp, **ADAMW, stage=int(stage))
    return Contender(ddp, optimizer, lambda: ddp.exposed_comm_s)


def communicates(name: str) -> bool:
    """Whether the ranks of this contender train together; the others are bounds."""
    kind, _, option = name.partition("/")
    return kind not in ("compute", "none") and option != "fake"


@functools.cache
def _group(backend: str) -> dist.ProcessGroup:
    """All ranks on a back end of torch.distributed; "fake" moves nothing and is over at once."""
    if backend == "fake":
        import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers it)
    return dist.new_group(backend=backend)


def _fsdp2(model: GPT, backend: str) -> nn.Module:
    """torch's fully_shard, one unit a block."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(_group(backend), "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _deepspeed(model: GPT) -> Contender:
    """ZeRO-1 with torch's AdamW, over DeepSpeed's own choice of transport."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch_adamw(model), config=settings)
    return Contender(engine, engine, backward=engine.backward)


def batch(config: GPTConfig, rank: int, sequences: int = BATCH) -> tuple[Tensor, Tensor]:
    """Tokens and targets of one rank, [sequences, config.max_seq] each."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2, sequences, config.max_seq)
    tokens, targets = torch.randint(config.vocab_size, shape, generator=generator)
    return tokens, targets


def time_turns(
    contenders: dict[str, Contender], comm: pycomm.Communicator, turns: int, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds a step, by contender and turn; a turn is ``steps`` steps after a barrier.

    Raises:
        RuntimeError: contenders that communicate came to different losses.
    """
    tokens, targets = batch(CONFIG, comm.rank)
    losses = {}
    for name, contender in contenders.items():  # buckets are rebuilt, states allocated
        for _ in range(WARM_UP):
            contender.step(tokens, targets)
        loss = contender.step(tokens, targets)
        comm.all_reduce(loss, op="avg")
        losses[name] = float(loss)
    together = {name: loss for name, loss in losses.items() if communicates(name)}
    if together and max(together.values()) - min(together.values()) > LOSS_TOLERANCE:
        raise RuntimeError(f"the contenders do not train alike; losses after {WARM_UP} steps: {together}")
    result: dict[str, dict[str, list[float]]] = {name: {"step_s": [], "waited_s": []} for name in contenders}
    for turn in range(turns):
        order = list(contenders.items())
        random.Random(turn).shuffle(order)  # the same on every rank; a slow moment hits other neighbours in each turn
        for name, contender in order:
            contender.step(tokens, targets)  # its memory is in the caches again
            dist.barrier()
            waited = 0.0
            start = time.perf_counter()
            for _ in range(steps):
                contender.step(tokens, targets)
                waited += contender.exposed_s()
            result[name]["step_s"].append((time.perf_counter() - start) / steps)
            result[name]["waited_s"].append(waited / steps)
    return result


def memory_of(name: str, comm: pycomm.Communicator, bucket_mb: float) -> dict[str, float]:
    """Bytes that a contender takes on this rank, shared pages divided by the ranks that map them (PSS).

    ``states``: parameters, gradients and optimizer states, between two steps. ``peak``: the most during a step,
    activations included. Both beyond what a plain model has left behind after forward and backward: libraries, and the
    matrix library's workspace.
    """
    _steps(build(name, comm, SMALL, bucket_mb), SMALL, comm.rank)  # loads what the contender loads
    _steps(Contender(GPT(LARGE, seed=0), None), LARGE, comm.rank)
    before = _pss_bytes()
    contender = build(name, comm, LARGE, bucket_mb)
    _steps(contender, LARGE, comm.rank)
    after = _pss_bytes()
    shared_by_others = _smaps("Rss") - _smaps("Pss")
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    contender.step(*batch(LARGE, comm.rank, sequences=1))
    status = Path("/proc/self/status").read_text()
    peak_rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    dist.barrier()
    return {
        "states": after - before,
        "peak": peak_rss - shared_by_others - before,
        "params": sum(p.numel() for p in GPT(LARGE).parameters()),
    }


def _steps(contender: Contender, config: GPTConfig, rank: int) -> None:
    for _ in range(WARM_UP):
        contender.step(*batch(config, rank, sequences=1))


def _pss_bytes() -> int:
    """After giving freed memory back: malloc keeps activations for the next step otherwise. Collective."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    dist.barrier()
    bytes_now = _smaps("Pss")
    dist.barrier()
    return bytes_now


def _smaps(field: str) -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(f"{field}:")) * 1024
