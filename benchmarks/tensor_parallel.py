"""Tensor-parallel blocks, forward and backward: pycomm, DTensor, and the same products with no communication.

``python benchmarks/tensor_parallel.py [--ranks 2] [--block mlp] [--shapes 256x1024x128,…] [--json FILE]``

Contenders take turns in one run (A B A B …), on ranks of one thread each. Shapes are hidden x ffn x tokens. A
contender's time in a round is that of its slowest rank. Overlap efficiency is
(sequential - fused) / (sequential - products alone).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.distributed as dist
from host import describe_host, load_warning
from torch import Tensor, nn

import pycomm
from pycomm.tensor_parallel import ColumnParallelLinear, RowParallelLinear

SHAPES = "256x1024x128,512x2048x512,1024x4096x1024"
HEAD_WIDTH = 64
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
    wrong: int  # values of outputs and gradients that differ from the unsharded block's beyond rounding


class MLP(nn.Module):
    """Two products with a GELU between them."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Attention(nn.Module):
    """Causal self-attention over heads of 64; whoever cuts the linear layers decides how many are here."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            layer(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(0, 1) for layer in (self.query, self.key, self.value)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.output(mixed.transpose(0, 1).flatten(1))


COLUMN, ROW = ("up", "query", "key", "value"), ("down", "output")


def block_of(name: str, hidden: int, ffn: int) -> nn.Module:
    torch.manual_seed(0)
    return MLP(hidden, ffn) if name == "mlp" else Attention(hidden)


def pycomm_block(block: nn.Module, comm: pycomm.Communicator, overlap: bool) -> nn.Module:
    for name, layer in list(block.named_children()):
        cut = ColumnParallelLinear if name in COLUMN else RowParallelLinear
        setattr(block, name, cut.from_linear(layer, comm, overlap=overlap))
    return block


def local_block(block: nn.Module, comm: pycomm.Communicator) -> nn.Module:
    """This rank's products and nothing else: its result is a partial sum."""
    for name, layer in list(block.named_children()):
        cut = ColumnParallelLinear if name in COLUMN else RowParallelLinear
        part = cut.from_linear(layer, comm)
        local = nn.Linear(part.weight.shape[1], part.weight.shape[0])
        local.weight, local.bias = part.weight, part.bias
        setattr(block, name, local)
    return block


def dtensor_block(block: nn.Module, ranks: int) -> nn.Module:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {name: ColwiseParallel() if name in COLUMN else RowwiseParallel() for name, _ in block.named_children()}
    return parallelize_module(block, DeviceMesh("cpu", list(range(ranks))), plan)


def step(block: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    block.zero_grad(set_to_none=True)
    out = block(x)
    out.backward(grad)
    return out


def count_wrong(block: nn.Module, reference: nn.Module, x: Tensor, grad: Tensor) -> int:
    """Differences in the output and in the input's gradient beyond what sums of that many terms may lose."""
    results = []
    for module in (block, reference):
        own = x.clone().requires_grad_()
        out = step(module, own, grad)
        results.append((out.detach(), own.grad))
    terms = max(p.numel() // p.shape[0] for p in reference.parameters() if p.dim() == 2) * 4
    return sum(int(((a - b).abs() > terms * 2**-24 * b.abs().max()).sum()) for a, b in zip(*results, strict=True))


def measure(
    comm: pycomm.Communicator, contenders: dict[str, Callable[[], object]], budget_s: float
) -> dict[str, list[float]]:
    """Times in ms of each contender, the slowest rank's of each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    go_on = torch.ones(1, dtype=torch.int64)
    while len(times[next(iter(times))]) < MAX_ROUNDS:
        for name, run in contenders.items():
            comm.barrier()
            start = time.perf_counter()
            run()
            mine = torch.tensor([(time.perf_counter() - start) * 1e3], dtype=torch.float64)
            comm.all_reduce(mine, op="max")
            times[name].append(mine.item())
        done = len(times[name])
        go_on[0] = done < MIN_ROUNDS or time.perf_counter() - began < budget_s
        comm.broadcast(go_on)
        if not go_on.item():
            break
    return {name: values[1:] for name, values in times.items()}  # the first round warms up


def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    comm = pycomm.init()
    dist.init_process_group("gloo")
    rows: list[Row] = []
    for hidden, ffn, tokens in options.shapes:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
        grad = torch.randn(tokens, hidden, generator=generator)
        blocks = {
            "pycomm": pycomm_block(block_of(options.block, hidden, ffn), comm, True),
            "pycomm, overlap off": pycomm_block(block_of(options.block, hidden, ffn), comm, False),
            "DTensor on gloo": dtensor_block(block_of(options.block, hidden, ffn), comm.world_size),
            "products alone": local_block(block_of(options.block, hidden, ffn), comm),
        }
        reference = block_of(options.block, hidden, ffn)
        wrong = {
            name: 0 if name == "products alone" else count_wrong(block, reference, x.detach(), grad)
            for name, block in blocks.items()
        }
        runs = {name: partial(step, block, x, grad) for name, block in blocks.items()}
        for name, times in measure(comm, runs, options.budget_s).items():
            low, _, high = quantiles(times, n=4)
            rows.append(
                Row("tensor_parallel", options.block, name, comm.world_size, hidden, ffn, tokens, len(times),
                    median(times), low, high, wrong[name])
            )  # fmt: skip
    if comm.rank == 0:
        report(rows, options)
    dist.destroy_process_group()
    comm.close()


def report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    host = describe_host()
    print(", ".join(f"{key} {value}" for key, value in host.items()))
    if (warning := load_warning()) is not None:
        print(warning)
    print(
        f"{'shape':>15} {'contender':<22} {'ms p50':>8} {'p25':>8} {'p75':>8} {'x DTensor':>10} {'of bound':>9} #wrong"
    )
    for row in rows:
        same = {r.contender: r for r in rows if (r.hidden, r.ffn, r.tokens) == (row.hidden, row.ffn, row.tokens)}
        speedup = same["DTensor on gloo"].time_ms_p50 / row.time_ms_p50
        share = same["products alone"].time_ms_p50 / row.time_ms_p50
        shape = f"{row.hidden}x{row.ffn}x{row.tokens}"
        print(
            f"{shape:>15} {row.contender:<22} {row.time_ms_p50:8.2f} {row.time_ms_p25:8.2f} {row.time_ms_p75:8.2f} "
            f"{speedup:9.2f}x {share:8.1%} {row.wrong:6d}"
        )
        if row.contender == "products alone":
            off, on = same["pycomm, overlap off"].time_ms_p50, same["pycomm"].time_ms_p50
            print(f"{shape:>15} overlap efficiency {(off - on) / (off - row.time_ms_p50):.0%}, on / off {on / off:.3f}")
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
    parser.add_argument("--json", type=Path)
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
