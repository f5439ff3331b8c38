"""One training step of a 7 M-parameter GPT under data parallelism, beside no communication at all.

    python benchmarks/data_parallel.py [--ranks 2] [--turns 8] [--memory] [--sweep FILE] [--json FILE]

README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from host import describe_host, load_warning
from launch import free_port

LABELS = {
    "compute": "forward and backward alone",
    "none": "no communication, torch's AdamW",
    "none/fused": "no communication, torch's fused AdamW",
    "ddp/gloo": "torch DDP on gloo",
    "ddp/gloo-view": "the same, gradients as views",
    "ddp/pycomm": "torch DDP on pycomm",
    "ddp/fake": "torch DDP whose collectives do nothing",
    "fsdp2/gloo": "torch FSDP2 on gloo",
    "fsdp2/pycomm": "torch FSDP2 on pycomm",
    "fsdp2/fake": "torch FSDP2 whose collectives do nothing",
    "deepspeed": "DeepSpeed ZeRO-1, torch's AdamW",
    "pycomm": "pycomm.DataParallel, torch's AdamW",
    "pycomm/after": "the same, overlap=False",
    "zero0": "ShardedAdamW, stage 0",
    "zero1": "ShardedAdamW, stage 1",
    "zero1/after": "the same, overlap=False: one pass",
    "zero2": "ShardedAdamW, stage 2",
}
SWEEP_MB = (0.25, 1, 4, 8, 16, 32)
TOKENS = 4 * 128
# Freed memory stays with the process, for every contender alike. By default glibc gives it back to the system and takes
# it again when it happens to lie at the heap's end: thousands of page faults in one step and none in the next.
KEEP_FREED = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=8, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--bucket-mb", type=float, default=25.0)
    parser.add_argument("--contenders", default=",".join(installed()))
    parser.add_argument("--memory", action="store_true", help="memory of model states instead of time")
    parser.add_argument("--sweep", type=Path, help="draw step time against bucket size into this file instead")
    parser.add_argument("--json", type=Path, help="write one JSON object a line here")
    options = parser.parse_args()
    names = options.contenders.split(",")
    if unknown := set(names) - set(LABELS):
        parser.error(f"unknown contenders {sorted(unknown)}: they are {', '.join(LABELS)}")
    host = describe_host()
    print(f"# {host['cpu']}, {host['cores']} cores, torch {host['torch']}, {options.ranks} ranks of one thread")
    if warning := load_warning():
        print(f"# {warning}")
    if options.memory:
        rows = memory_rows(names, options)
    elif options.sweep:
        rows = sweep_rows(options)
    else:
        rows = time_rows(names, options.bucket_mb, options)
        print_times(rows)
    if options.json:
        options.json.write_text(
            "".join(json.dumps({"bench": "data_parallel", "host": host, **row}) + "\n" for row in rows)
        )


def installed() -> list[str]:
    """Every contender whose library is here."""
    return [name for name in LABELS if name != "deepspeed" or importlib.util.find_spec(name) is not None]


def run(task: str, names: list[str], bucket_mb: float, options: argparse.Namespace) -> list[dict[str, object]]:
    """What each rank of a fresh group found."""
    with tempfile.TemporaryDirectory(prefix="pycomm-bench-") as folder:
        port = free_port()
        command = [sys.executable, __file__, "--worker", task, ",".join(names), str(bucket_mb)]
        command += [str(options.turns), str(options.steps), folder]
        ranks = []
        for rank in range(options.ranks):
            env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.ranks))
            env.update(LOCAL_WORLD_SIZE=str(options.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            env.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
            env.update(KEEP_FREED if task == "time" else {})
            ranks.append(subprocess.Popen(command, env=env))
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise SystemExit(f"a rank failed: exit codes {codes}")
        return [json.loads((Path(folder) / f"rank{rank}").read_text()) for rank in range(options.ranks)]


def time_rows(names: list[str], bucket_mb: float, options: argparse.Namespace) -> list[dict[str, object]]:
    """One row a contender: milliseconds of a step, the slowest rank's, median and extremes over turns."""
    found = run("time", names, bucket_mb, options)
    rows = []
    for name in names:
        turns = [1e3 * max(ranks) for ranks in zip(*(rank[name]["step_s"] for rank in found), strict=True)]
        waited = [1e3 * max(ranks) for ranks in zip(*(rank[name]["waited_s"] for rank in found), strict=True)]
        rows.append(
            {
                "contender": name,
                "ranks": options.ranks,
                "bucket_mb": bucket_mb,
                "step_ms_p50": statistics.median(turns),
                "step_ms_min": min(turns),
                "step_ms_max": max(turns),
                "waited_ms_p50": statistics.median(waited),
                "tokens_per_s": options.ranks * TOKENS / statistics.median(turns) * 1e3,
            }
        )
    median = {row["contender"]: row["step_ms_p50"] for row in rows}
    for row in rows:
        row["exposed_ms"] = row["step_ms_p50"] - median["none"] if "none" in median else None
    return rows


PEERS = {"% none": "none", "x DDP": "ddp/gloo", "x FSDP2": "fsdp2/gloo"}


def print_times(rows: list[dict[str, object]]) -> None:
    median = {row["contender"]: row["step_ms_p50"] for row in rows}
    print(f"{'':40} {'ms/step':>8} {'min':>7} {'max':>7} {'tokens/s':>9} {'- none':>7}", *(f"{p:>8}" for p in PEERS))
    for row in rows:
        ratios = [median.get(peer, math.nan) / row["step_ms_p50"] for peer in PEERS.values()]
        exposed = math.nan if row["exposed_ms"] is None else row["exposed_ms"]
        print(
            f"{LABELS[row['contender']]:40} {row['step_ms_p50']:8.1f} {row['step_ms_min']:7.1f} "
            f"{row['step_ms_max']:7.1f} {row['tokens_per_s']:9,.0f} {exposed:7.1f} {100 * ratios[0]:8.1f} "
            f"{ratios[1]:8.2f} {ratios[2]:8.2f}"
        )


def memory_rows(names: list[str], options: argparse.Namespace) -> list[dict[str, object]]:
    """One row a contender: bytes a parameter of model states on a rank, measured, and by arithmetic."""
    rows = []
    print(f"{'':40} {'states MB':>10} {'bytes/param':>12} {'arithmetic':>11} {'off':>6} {'peak MB':>8}")
    for name in names:
        found = run("memory", [name], options.bucket_mb, options)
        params = found[0]["params"]
        states = statistics.mean(rank["states"] for rank in found)
        peak = max(rank["peak"] for rank in found)
        expected = arithmetic(name, options.ranks)
        rows.append(
            {
                "contender": name,
                "ranks": options.ranks,
                "params": params,
                "states_bytes": states,
                "arithmetic_bytes": expected * params,
                "peak_bytes": peak,
            }
        )
        off = 100 * (states / params / expected - 1)
        print(
            f"{LABELS[name]:40} {states / 1e6:10.1f} {states / params:12.2f} {expected:11.2f} {off:+5.1f}% "
            f"{peak / 1e6:8.1f}",
            flush=True,
        )
    return rows


def arithmetic(name: str, ranks: int) -> float:
    """Bytes a parameter of fp32 parameters, gradients and AdamW's two averages on a rank."""
    if name == "compute":
        return 8
    if name.startswith("zero1") or name == "deepspeed":
        return 8 + 8 / ranks
    if name == "zero2":
        return 4 + 12 / ranks
    return 16 / ranks if name.startswith("fsdp2") else 16


SWEPT = ("ddp/gloo", "pycomm", "zero1")


def sweep_rows(options: argparse.Namespace) -> list[dict[str, object]]:
    """One row a contender and bucket size; all of them take turns in the same processes."""
    names = ["none", *(f"{name}@{bucket_mb}" for name in SWEPT for bucket_mb in SWEEP_MB)]
    rows = time_rows(names, options.bucket_mb, options)
    for row in rows:
        row["contender"], _, bucket_mb = str(row["contender"]).partition("@")
        row["bucket_mb"] = float(bucket_mb) if bucket_mb else None
        print(f"{LABELS[row['contender']]:40} {bucket_mb:>6} {row['step_ms_p50']:8.1f} {row['step_ms_min']:7.1f}")
    draw(rows, options)
    return rows


def draw(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(rows[0]["step_ms_min"], color="black", linestyle="--", label=LABELS["none"])
    for name, aside in zip(SWEPT, (0.95, 1.0, 1.05), strict=True):  # so that spreads do not cover each other
        mine = [row for row in rows if row["contender"] == name]
        sizes, fastest = [aside * r["bucket_mb"] for r in mine], [r["step_ms_min"] for r in mine]
        to_median = [r["step_ms_p50"] - r["step_ms_min"] for r in mine]
        spread = [[0.0] * len(mine), to_median]
        axes.errorbar(sizes, fastest, spread, marker="o", capsize=3, elinewidth=0.6, label=LABELS[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks(SWEEP_MB, [f"{size:g}" for size in SWEEP_MB])
    axes.set_xlabel("bucket_mb, MiB")
    axes.set_ylabel("step, ms: the fastest turn, and up to the median")
    axes.set_title(f"GPT of 6.9 M parameters, {options.ranks} ranks of one thread", fontsize=9)
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(options.sweep, dpi=150)


def worker(task: str, names: list[str], bucket_mb: float, turns: int, steps: int, folder: str) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist
    import training

    import pycomm

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    comm = pycomm.init("host")
    if task == "time":
        contenders = {}
        for name in names:
            kind, _, own_mb = name.partition("@")
            contenders[name] = training.build(kind, comm, training.CONFIG, float(own_mb or bucket_mb))
        found = training.time_turns(contenders, comm, turns, steps)
    else:
        found = training.memory_of(names[0], comm, bucket_mb)
    (Path(folder) / f"rank{comm.rank}").write_text(json.dumps(found))
    comm.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        task, names, bucket_mb, turns, steps, folder = sys.argv[2:]
        worker(task, names.split(","), float(bucket_mb), int(turns), int(steps), folder)
    else:
        main()
