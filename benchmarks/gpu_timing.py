"""Times of work on one GPU: captured in CUDA graphs, so that no host takes part, and measured in turns."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Work = Callable[[], object]


@dataclass
class Row:
    """One line of docs/gpu_results.md."""

    question: str
    value: float
    unit: str
    target: str = ""  # what it shall be, in words
    met: bool | None = None  # None: there is no target
    detail: str = ""


def captured(work: Work, calls: int = 1) -> Work:
    """``work``, ``calls`` times, as one CUDA graph. It has run before, outside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    return graph.replay


def times_ms(contenders: Sequence[Work], rounds: int = 20, warm_up: int = 3) -> list[float]:
    """Median milliseconds of each, measured in turns (A B A B …)."""
    for _ in range(warm_up):
        for work in contenders:
            work()
    torch.cuda.synchronize()
    samples: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for work, times in zip(contenders, samples, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return [statistics.median(times) for times in samples]


def copy_bytes_per_ms(num_bytes: int = 1 << 30) -> float:
    """Bytes that a device-to-device copy reads and writes in a millisecond."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    (time,) = times_ms([lambda: target.copy_(source)])
    return 2 * num_bytes / time


def main(measures: Sequence[Callable[[], list[Row]]]) -> None:
    """Run all measures, also when one fails; write their rows as JSON lines. Exit status 1 if one failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True, help="file that rows are appended to")
    path = parser.parse_args().json
    failed = []
    for measure in measures:
        try:
            rows = measure()
        except (RuntimeError, ValueError, AssertionError) as error:
            failed.append(measure.__name__)
            print(f"{measure.__name__} failed: {type(error).__name__}: {error}", flush=True)
            continue
        with path.open("a") as file:
            for row in rows:
                print(f"{row.question}: {row.value:.4g} {row.unit} {row.detail}", flush=True)
                file.write(json.dumps(asdict(row)) + "\n")
        torch.cuda.empty_cache()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
