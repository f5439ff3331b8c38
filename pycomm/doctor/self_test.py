"""Two real processes that use the host transport: right results, then one latency and one bandwidth."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pycomm.doctor.checks import Check
from pycomm.spawn import ends_with_this_process, same_imports

NUM_RANKS = 2


@dataclass(frozen=True)
class RankResult:
    """What one rank found. ``wrong`` names the checks whose result was not the expected bits."""

    wrong: list[str]
    latency_us: float
    bandwidth_gbps: float


def self_test(timeout_s: float, *, worker: str = "pycomm.doctor.worker") -> list[Check]:
    """Run module ``worker`` as two ranks. All of it ends within ``timeout_s`` seconds, whatever the ranks do."""
    deadline = time.monotonic() + timeout_s
    # The ranks' own limit is half of it, so that the error that names what is missing comes first.
    with started_ranks(worker, timeout_s / 2) as ranks:
        results = [finish(process, rank, deadline) for rank, process in enumerate(ranks)]
    failures = [result for result in results if isinstance(result, str)]
    if failures:
        return [Check("two ranks", "failed", "; ".join(failures), "docs/errors.md explains each error")]
    return judge([result for result in results if isinstance(result, RankResult)])


@contextmanager
def started_ranks(worker: str, timeout_s: float) -> Iterator[list["subprocess.Popen[str]"]]:
    """Run module ``worker`` once a rank, with the arguments STORE NUM_RANKS TIMEOUT_S RANK, whatever launcher this
    process runs in; whatever happens, no rank is left in the end."""
    with tempfile.TemporaryDirectory(prefix="pycomm-doctor-") as scratch:
        run = f"import runpy; runpy.run_module({worker!r}, run_name='__main__', alter_sys=True)"
        code = f"{same_imports()}\n{ends_with_this_process()}\n{run}"
        command = [sys.executable, "-c", code, str(Path(scratch) / "store"), str(NUM_RANKS), str(timeout_s)]
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(NUM_RANKS)
        ]
        try:
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.communicate()


def finish(process: "subprocess.Popen[str]", rank: int, deadline: float) -> RankResult | str:
    """The rank's result, or a sentence that says why there is none."""
    try:
        output, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return f"rank {rank} did not finish in time"
    if process.returncode != 0:
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        return f"rank {rank}: {lines[-1]}"
    return RankResult(**json.loads(output))


def judge(results: list[RankResult]) -> list[Check]:
    wrong = sorted({name for result in results for name in result.wrong})
    if wrong:
        advice = "try PYCOMM_SIMD=baseline, and please report it with this output"
        return [Check("two ranks", "failed", f"wrong result: {', '.join(wrong)}", advice)]
    latency_us = max(result.latency_us for result in results)
    bandwidth_gbps = min(result.bandwidth_gbps for result in results)
    return [
        Check("two ranks", "ok", "all_reduce and broadcast, float32 and bfloat16, every bit as expected"),
        Check("latency", "ok", f"{latency_us:.1f} µs (all_reduce of one float32, median)"),
        Check("bandwidth", "ok", f"{bandwidth_gbps:.1f} GB/s (all_reduce of 16 MiB in symmetric memory, median)"),
    ]
