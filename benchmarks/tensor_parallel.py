"""Tensor-parallel blocks, forward and backward: pycomm, DTensor, and the same products with no communication.

``python benchmarks/tensor_parallel.py [--ranks 2] [--block mlp] [--shapes 256x1024x128,…] [--json FILE] [--svg FILE]``

Contenders take turns in one run, each round in another order, on ranks of one thread each. Shapes are hidden x ffn x
tokens. A contender's time in a round is that of its slowest rank. benchmarks/README.md derives the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import tensor_parallel_timeline as timeline
import torch
import torch.distributed as dist
from host import describe_host, load_warning
from tensor_parallel_blocks import block_of, count_wrong, dtensor_block, local_block, pycomm_block, step
from torch import nn

import pycomm

SHAPES = "256x1024x128,512x2048x512,1024x4096x1024"
OWN, GLOO, TORCH, BOUND = "pycomm", "DTensor on gloo", "DTensor on pycomm", "products alone"
BUDGET_S = 8.0  # of one shape, all contenders together
MIN_ROUNDS, MAX_ROUNDS = 7, 200


@dataclass(frozen=True)
class Row:
    """One contender on one shape; times are of forward and backward together."""

    bench: str
    block: str
    contender: str
    ranks: int
    hidden: int
    ffn: int
    tokens: int
    rounds: int
    time_ms_p50: float
    time_ms_p25: float
    time_ms_p75: float
    speedup: float  # of DTensor on gloo's time over this one's in the same round, the median
    bound_share: float  # of the products' time over this one's in the same round, the median
    wrong: int  # values of outputs and gradients that differ from the unsharded block's beyond rounding


def measure(
    comm: pycomm.Communicator, contenders: dict[str, Callable[[], object]], budget_s: float
) -> dict[str, list[float]]:
    """Times in ms of each contender, the slowest rank's of each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    names = list(contenders)
    go_on = torch.ones(1, dtype=torch.int64)
    for done in range(MAX_ROUNDS):
        for name in random.Random(done).sample(names, len(names)):  # whoever comes second finds the other's code cached
            comm.barrier()
            start = time.perf_counter()
            contenders[name]()
            mine = torch.tensor([(time.perf_counter() - start) * 1e3], dtype=torch.float64)
            comm.all_reduce(mine, op="max")
            times[name].append(mine.item())
        go_on[0] = done < MIN_ROUNDS or time.perf_counter() - began < budget_s
        comm.broadcast(go_on)
        if not go_on.item():
            break
    return {name: values[1:] for name, values in times.items()}  # the first round warms up


def rows_of(comm: pycomm.Communicator, groups: dict[str, dist.ProcessGroup], options: argparse.Namespace) -> list[Row]:
    """Check and measure every contender on every shape."""
    rows: list[Row] = []
    for hidden, ffn, tokens in options.shapes:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
        grad = torch.randn(tokens, hidden, generator=generator)

        def block(hidden: int = hidden, ffn: int = ffn) -> nn.Module:
            return block_of(options.block, hidden, ffn)

        blocks = {
            OWN: pycomm_block(block(), comm),
            GLOO: dtensor_block(block(), groups["gloo"]),
            TORCH: dtensor_block(block(), groups["pycomm"]),
            BOUND: local_block(block(), comm),
        }
        wrong = {name: 0 if name == BOUND else count_wrong(blocks[name], block(), x, grad) for name in blocks}
        runs = {name: partial(step, blocks[name], x, grad) for name in blocks}
        times = measure(comm, runs, options.budget_s)
        for name, own in times.items():
            low, middle, high = quantiles(own, n=4)
            rows.append(
                Row("tensor_parallel", options.block, name, comm.world_size, hidden, ffn, tokens, len(own),
                    middle, low, high, _ratio(times[GLOO], own), _ratio(times[BOUND], own), wrong[name])
            )  # fmt: skip
        if options.svg is not None and (hidden, ffn, tokens) == options.shapes[-1]:
            draw_step(comm, OWN, runs[OWN], options.svg)
    return rows


def draw_step(comm: pycomm.Communicator, name: str, run: Callable[[], object], path: Path) -> None:
    """A picture of one step."""
    timeline.record(run)  # the profiler's first step is slow
    comm.barrier()
    found: list[list[timeline.Span]] = [[] for _ in range(comm.world_size)]
    dist.all_gather_object(found, timeline.record(run))
    if comm.rank == 0:
        timeline.draw({name: found}, path)


def _ratio(times: Sequence[float], own: Sequence[float]) -> float:
    return median(other / mine for other, mine in zip(times, own, strict=True))


def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    comm = pycomm.init("host")
    dist.init_process_group("gloo")
    groups = {name: dist.new_group(backend=name) for name in ("gloo", "pycomm")}
    rows = rows_of(comm, groups, options)
    if comm.rank == 0:
        report(rows, options)
    comm.barrier()
    dist.destroy_process_group()
    comm.close()


def report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    host = describe_host()
    print(", ".join(f"{key} {value}" for key, value in host.items()))
    if (warning := load_warning()) is not None:
        print(warning)
    print(
        f"{'shape':>15} {'contender':<20} {'ms p50':>8} {'p25':>8} {'p75':>8} {'x DTensor':>10} {'of bound':>9} #wrong"
    )
    for row in rows:
        shape = f"{row.hidden}x{row.ffn}x{row.tokens}"
        print(
            f"{shape:>15} {row.contender:<20} {row.time_ms_p50:8.2f} {row.time_ms_p25:8.2f} {row.time_ms_p75:8.2f} "
            f"{row.speedup:9.2f}x {row.bound_share:8.1%} {row.wrong:6d}"
        )
    if options.json is not None:
        with options.json.open("a") as file:
            for row in rows:
                file.write(json.dumps({**asdict(row), "host": host}) + "\n")


def shapes_of(text: str) -> list[tuple[int, int, int]]:
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]
    if any(len(shape) != 3 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text!r}: shapes are hidden x ffn x tokens, such as {SHAPES}")
    return shapes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--block", choices=("mlp", "attention"), default="mlp")
    parser.add_argument("--shapes", type=shapes_of, default=shapes_of(SHAPES))
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds a shape")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append JSON lines, one a contender and shape")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw one step of the last shape")
    options = parser.parse_args()
    if "RANK" in os.environ:
        worker(options)
        return 0
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"WORLD_SIZE": str(options.ranks), "LOCAL_WORLD_SIZE": str(options.ranks), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(options.ranks)
    ]
    codes = [process.wait() for process in ranks]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
