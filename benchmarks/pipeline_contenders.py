"""What each rank of benchmarks/pipeline.py does: build every contender on the same weights, then steps in turn."""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.distributed.pipelining as torch_pipelining
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pycomm
from pycomm import Communicator
from pycomm.models import GPT, GPTConfig, GPTStage, gpt_layers, gpt_stages, next_token_loss, split_gpt
from pycomm.pipeline import (
    Pipeline,
    Schedule,
    Timeline,
    build,
    draw,
    measure_layers,
    measure_memory,
    measured_costs,
    simulate,
)

_WARMUP = 3  # steps of each contender that are not counted
_MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """The model (7 M parameters by default), the batch, and how often."""

    ranks: int = 2
    microbatches: int = 8
    micro_batch: int = 1
    layers: int = 6
    hidden: int = 256
    heads: int = 8
    vocab: int = 4096
    seq: int = 128
    steps: int = 15
    contenders: tuple[str, ...] = ()

    def config(self) -> GPTConfig:
        return GPTConfig(
            vocab_size=self.vocab,
            max_seq=self.seq,
            num_layers=self.layers,
            num_heads=self.heads,
            hidden=self.hidden,
            tie_embeddings=False,  # torch.distributed.pipelining has no tied weights across stages
        )

    def describe(self) -> str:
        return (
            f"GPT of {self.layers} layers, width {self.hidden}, vocabulary {self.vocab}, "
            f"micro-batches of {self.micro_batch} x {self.seq} tokens"
        )

    def even_cuts(self, num_stages: int) -> list[range]:
        """Blocks divided evenly, as people cut by hand: the embedding comes first, the output last."""
        ends = [1 + self.layers * n // num_stages for n in range(num_stages + 1)]
        ends[0], ends[-1] = 0, self.layers + 2
        return [range(start, end) for start, end in pairwise(ends)]


@dataclass
class Contender:
    """One way to make a step. ``pipe`` and ``schedule`` only where pycomm does it."""

    step: Callable[[], Tensor | None]
    module: nn.Module
    pipe: Pipeline | None = None
    schedule: Schedule | None = None


class Rank:
    """One rank: its communicators, its batch, its contenders."""

    def __init__(self, rank: int, settings: Settings, store_path: str) -> None:
        torch.set_num_threads(1)
        store = dist.FileStore(store_path, settings.ranks)
        timeout = datetime.timedelta(seconds=120)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=settings.ranks, timeout=timeout)
        self.comm = pycomm.init(
            "host", store=dist.PrefixStore("pycomm", store), rank=rank, world_size=settings.ranks, timeout_s=120
        )
        self.settings = settings
        shape = settings.microbatches * settings.micro_batch, settings.seq + 1
        tokens = torch.randint(settings.vocab, shape, generator=torch.Generator().manual_seed(0))
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def pycomm(self, name: str, chunks: int = 1, cuts: Sequence[range] | None = None) -> Contender:
        model = GPT(self.settings.config())
        cuts = cuts or self.settings.even_cuts(self.settings.ranks * (2 if name == "zb_v" else chunks))
        memory = self._stage_memory(cuts) if name == "zb_h1" else None
        schedule = build(name, self.settings.ranks, self.settings.microbatches, chunks, stage_memory=memory)
        stages = gpt_stages(model, self.comm, schedule.rank_of, cuts)
        pipe = Pipeline(stages, schedule, next_token_loss)
        first, last = self.comm.rank == schedule.rank_of[0], self.comm.rank == schedule.rank_of[-1]
        inputs, targets = self.inputs if first else None, self.targets if last else None
        modules = nn.ModuleList(stage.module for stage in stages)
        return Contender(lambda: pipe.step(inputs, targets), modules, pipe, schedule)

    def _stage_memory(self, cuts: Sequence[range]) -> list[float]:
        """What the stages of these layers keep of a micro-batch; the same number on every rank."""
        sample, loss_of = self._sample()
        kept = measure_memory(gpt_layers(GPT(self.settings.config())), sample, loss_of=loss_of)
        return [float(sum(kept[layer] for layer in cut)) for cut in cuts]

    def automatic(self, name: str) -> Contender:
        """A schedule on stages that are even by the measured costs of the layers; rank 0's measurement, for all."""
        layers = gpt_layers(GPT(self.settings.config()))
        sample, loss_of = self._sample()
        costs = torch.tensor(measure_layers(layers, sample, loss_of=loss_of, repeats=10))
        self.comm.broadcast(costs)
        return self.pycomm(name, cuts=split_gpt(GPT(self.settings.config()), self.settings.ranks, costs.tolist()))

    def _sample(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """One micro-batch and its loss."""
        sample, target = (part[: self.settings.micro_batch] for part in (self.inputs, self.targets))
        return sample, lambda output: next_token_loss(output, target)

    def torch(self, name: str, chunks: int = 1) -> Contender:
        model = GPT(self.settings.config())
        num_stages = self.settings.ranks * chunks
        cuts = self.settings.even_cuts(num_stages)
        mine = [stage for stage in range(num_stages) if self._torch_rank(name, stage) == self.comm.rank]
        modules = [GPTStage(model, cuts[stage]) for stage in mine]
        device = torch.device("cpu")
        stages = [
            torch_pipelining.PipelineStage(module, stage, num_stages, device)
            for module, stage in zip(modules, mine, strict=True)
        ]
        schedule = getattr(torch_pipelining, name)(
            stages if chunks > 1 else stages[0], self.settings.microbatches, next_token_loss
        )
        losses: list[Tensor] = []

        def step() -> Tensor | None:
            losses.clear()
            inputs = (self.inputs,) if 0 in mine else ()
            if num_stages - 1 in mine:
                schedule.step(*inputs, target=self.targets, losses=losses)
                return torch.stack(losses).mean().detach()
            schedule.step(*inputs)
            return None

        return Contender(step, nn.ModuleList(modules))

    def _torch_rank(self, name: str, stage: int) -> int:
        ranks = self.settings.ranks
        return min(stage, 2 * ranks - 1 - stage) if name == "ScheduleZBVZeroBubble" else stage % ranks


CONTENDERS: dict[str, Callable[[Rank], Contender]] = {
    "torch-gpipe": lambda rank: rank.torch("ScheduleGPipe"),
    "torch-1f1b": lambda rank: rank.torch("Schedule1F1B"),
    "torch-interleaved-2": lambda rank: rank.torch("ScheduleInterleaved1F1B", 2),
    "torch-zbv": lambda rank: rank.torch("ScheduleZBVZeroBubble", 2),
    "pycomm-gpipe": lambda rank: rank.pycomm("gpipe"),
    "pycomm-1f1b": lambda rank: rank.pycomm("1f1b"),
    "pycomm-interleaved-2": lambda rank: rank.pycomm("interleaved_1f1b", 2),
    "pycomm-zb_h1": lambda rank: rank.pycomm("zb_h1"),
    "pycomm-zb_v": lambda rank: rank.pycomm("zb_v"),
    "pycomm-1f1b-automatic": lambda rank: rank.automatic("1f1b"),
    "pycomm-zb_h1-automatic": lambda rank: rank.automatic("zb_h1"),
}


def run_rank(rank_number: int, settings: Settings, store_path: str, svg_path: Path | None) -> list[dict[str, object]]:
    """All contenders' steps in turn; one row each, the same on all ranks."""
    rank = Rank(rank_number, settings, store_path)
    contenders = {name: CONTENDERS[name](rank) for name in settings.contenders}
    losses = {name: _settled(rank, contender) for name, contender in contenders.items()}
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    timelines: dict[str, list[Timeline]] = {name: [] for name in contenders}
    for _ in range(settings.steps):
        for name, contender in contenders.items():
            steps[name].append(_timed(rank, contender))
            if contender.pipe is not None:
                timelines[name].append(contender.pipe.timeline())
    comm_s = _transfer_s(rank.comm, settings.micro_batch * settings.seq * settings.hidden)
    rows = []
    drawn: dict[str, Timeline] = {}
    for name, contender in contenders.items():
        row: dict[str, object] = {"contender": name, "loss": losses[name], "steps_ms": [1e3 * s for s in steps[name]]}
        row["peak_mib"] = _peak_mib(rank, contender)
        if contender.schedule is not None:
            costs = measured_costs(timelines[name], contender.schedule.num_stages, comm_s)
            simulated = simulate(contender.schedule, costs)
            middle = sorted(timelines[name], key=lambda timeline: timeline.makespan)[len(timelines[name]) // 2]
            busy = [[sum(s.end - s.start for s in spans) for spans in t.ranks] for t in timelines[name]]
            row |= {
                "simulated_ms": 1e3 * simulated.makespan,
                "bubble": median(timeline.bubble_fraction for timeline in timelines[name]),
                "simulated_bubble": simulated.bubble_fraction,
                "busiest_ms": 1e3 * max(median(column) for column in zip(*busy, strict=True)),
                "comm_us": 1e6 * comm_s,
                "peak_activations": simulated.peak_activations,
            }
            if name in ("pycomm-1f1b", "pycomm-zb_h1"):
                drawn |= {f"{name}, measured": middle, f"{name}, simulated": simulated}
        rows.append(row)
    if svg_path is not None and rank_number == 0:
        draw.svg(drawn, svg_path)
    rank.comm.barrier()
    dist.destroy_process_group()
    rank.comm.close()
    return rows


def _settled(rank: Rank, contender: Contender) -> float:
    """Warm up; the loss of the last step, which every contender must agree on."""
    for _ in range(_WARMUP):
        contender.module.zero_grad()
        loss = contender.step()
    value = torch.tensor([0.0 if loss is None else float(loss)], dtype=torch.float64)
    rank.comm.all_reduce(value)
    want = float(next_token_loss(GPT(rank.settings.config())(rank.inputs), rank.targets).detach())
    if abs(float(value) - want) > 1e-4 * want:  # fp32 sums of a few thousand terms in another order
        raise RuntimeError(f"a contender's loss is {float(value)}, that of one process {want}")
    return float(value)


def _timed(rank: Rank, contender: Contender) -> float:
    """Seconds from the first rank's start to the last rank's end."""
    contender.module.zero_grad()
    rank.comm.barrier()
    start = time.perf_counter()
    contender.step()
    times = torch.tensor([-start, time.perf_counter()], dtype=torch.float64)
    rank.comm.all_reduce(times, "max")
    return float(times.sum())


def _transfer_s(comm: Communicator, num_elements: int, turns: int = 200) -> float:
    """Median seconds of one message of so many floats, one way: half of a ping-pong between ranks 0 and 1."""
    if comm.world_size == 1:
        return 0.0
    tensor = comm.empty(num_elements)
    tensor.zero_()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        if comm.rank == 0:
            comm.send(tensor, 1)
            comm.recv(tensor, 1)
        elif comm.rank == 1:
            comm.recv(tensor, 0)
            comm.send(tensor, 0)
        times.append((time.perf_counter() - start) / 2)
    middle = torch.tensor([median(times)], dtype=torch.float64)
    comm.broadcast(middle)
    return float(middle)


def _peak_mib(rank: Rank, contender: Contender) -> float:
    """The most memory that torch has allocated in a step, less what it had before; the most of all ranks.

    Counted by the profiler from every allocation. Resident memory would say more about the allocator than about the
    step: from one run to the next it differs by a fifth.
    """
    contender.module.zero_grad()
    gc.collect()
    rank.comm.barrier()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        contender.step()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    sizes = [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]
    most = torch.tensor([max(accumulate(sizes, initial=0)) / _MIB], dtype=torch.float64)
    rank.comm.all_reduce(most, "max")
    return float(most)
