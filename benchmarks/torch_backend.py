"""One training step with torch's own DDP and FSDP2, on gloo and on the back end "pycomm", beside no communication.

``python benchmarks/torch_backend.py --ranks 2 --turns 5 --steps 4 --json out.jsonl``

A GPT of 6.8 million parameters (6 layers, width 256, 8 heads, vocabulary 4096, untied), 4 x 128 tokens a rank, torch's
AdamW, one thread a rank. All contenders live in the same processes and take turns, A B C A B C …; a barrier stands
before every step, the time of a step is that of its slowest rank. Every contender trains the same model on the same
tokens, and before anything is timed the losses of those that communicate must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from host import describe_host, load_warning
from linux import die_with_parent
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pycomm
from pycomm.models.gpt import GPT, GPTConfig, next_token_loss

CONFIG = GPTConfig(
    vocab_size=4096, max_seq=128, num_layers=6, num_heads=8, hidden=256, positions="learned", tie_embeddings=False
)
BATCH = 4
CONTENDERS = ("none", "ddp-gloo", "ddp-pycomm", "fsdp2-gloo", "fsdp2-pycomm")
# Losses of two runs whose gradients were added in another order, after a few steps of Adam at this learning rate.
LEARNING_RATE, LOSS_TOLERANCE = 1e-4, 1e-3


def ddp(model: GPT, group: dist.ProcessGroup) -> nn.Module:
    """torch's DistributedDataParallel with its defaults, over ``group``."""
    return DistributedDataParallel(model, process_group=group)


def fsdp2(model: GPT, group: dist.ProcessGroup) -> nn.Module:
    """torch's fully_shard, one unit a block, over ``group``."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def step_of(name: str, groups: dict[str, dist.ProcessGroup], rank: int) -> Callable[[], float]:
    """A function that makes one training step of a contender and returns its loss."""
    wrapper, _, backend = name.partition("-")
    model = GPT(CONFIG, seed=0)
    wrapped = model if wrapper == "none" else {"ddp": ddp, "fsdp2": fsdp2}[wrapper](model, groups[backend])
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(rank)

    def step() -> float:
        tokens = torch.randint(CONFIG.vocab_size, (BATCH, CONFIG.max_seq + 1), generator=generator)
        loss = next_token_loss(wrapped(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def run(rank: int, options: argparse.Namespace, path: str, results: mp.SimpleQueue) -> None:
    """One rank: every contender's steps, in turns."""
    die_with_parent()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(path, options.ranks), rank=rank, world_size=options.ranks,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    comm = pycomm.init()
    groups = {name: dist.new_group(backend=name) for name in ("gloo", "pycomm")}
    steps = {name: step_of(name, groups, rank) for name in options.contenders}
    times_ms: dict[str, list[float]] = {name: [] for name in steps}
    losses = {name: [step() for _ in range(options.warmup)][-1] for name, step in steps.items()}
    for _ in range(options.turns):
        for name, step in steps.items():
            for _ in range(options.steps):
                comm.barrier()
                start = time.perf_counter()
                step()
                elapsed = torch.tensor((time.perf_counter() - start) * 1e3)
                comm.all_reduce(elapsed, op="max")
                times_ms[name].append(elapsed.item())
    if rank == 0:
        results.put((times_ms, losses))
    comm.barrier()
    dist.destroy_process_group()
    comm.close()


def report(times_ms: dict[str, list[float]], options: argparse.Namespace) -> list[dict[str, object]]:
    """Print the table; returns its rows."""
    medians = {name: statistics.median(times) for name, times in times_ms.items()}
    tokens = options.ranks * BATCH * CONFIG.max_seq
    print(f"{'contender':14} {'ms a step':>10} {'fastest':>9} {'slowest':>9} {'tokens/s':>9} {'exposed ms':>11}")
    rows: list[dict[str, object]] = []
    for name, median in medians.items():
        exposed = median - medians["none"] if "none" in medians else None
        rows.append(
            {
                "bench": "torch_backend", "contender": name, "ranks": options.ranks, "steps": len(times_ms[name]),
                "step_ms_p50": median, "step_ms_min": min(times_ms[name]), "step_ms_max": max(times_ms[name]),
                "tokens_per_s": tokens / median * 1e3, "exposed_ms": exposed,
            }
        )  # fmt: skip
        print(
            f"{name:14} {median:10.1f} {min(times_ms[name]):9.1f} {max(times_ms[name]):9.1f} "
            f"{tokens / median * 1e3:9.0f} {'' if exposed is None else format(exposed, '11.1f')}"
        )
    for wrapper in ("ddp", "fsdp2"):
        pair = [medians.get(f"{wrapper}-{backend}") for backend in ("gloo", "pycomm")]
        if None not in pair:
            print(f"{wrapper}: {pair[0] / pair[1]:.2f} x as fast on pycomm as on gloo")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each contender")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args()
    options.contenders = options.contenders.split(",")
    if unknown := set(options.contenders) - set(CONTENDERS):
        parser.error(f"--contenders: unknown: {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            run, (options, f"{folder}/store", results), nprocs=options.ranks, join=False, start_method="spawn"
        )
        while not context.join():
            pass
    times_ms, losses = results.get()
    host = describe_host()
    print(f"# {host['cpu']}, {host['cores']} cores, torch {host['torch']}, {options.ranks} ranks x 1 thread")
    if warning := load_warning():
        print(warning)
    rows = report(times_ms, options)
    if options.json is not None:
        options.json.write_text("".join(json.dumps({**row, "host": host}) + "\n" for row in rows))
    communicating = [loss for name, loss in losses.items() if name != "none"]
    if communicating and max(communicating) - min(communicating) > LOSS_TOLERANCE:
        print(f"the losses differ: {losses}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
