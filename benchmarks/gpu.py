"""All that needs a GPU, by one command and without a network: builds pycomm with CUDA code, tests the kernels, runs
them under compute-sanitizer, and measures them. Every part runs, whatever became of those before it; all of it ends
within 9 minutes. Results are in OUT/gpu_results.json and OUT/gpu_results.md, for docs/gpu_results.md.

    python3 benchmarks/gpu.py [--out build/gpu] [--parts build,tests,memcheck,racecheck,kernels,matmul]

Needs on the machine: nvcc, cmake, ninja, scikit-build-core, pybind11, pytest, torch with CUDA; compute-sanitizer.
Exit status 0: every part passed; 1: one failed or was not run. Targets that are missed are in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 530.0
LEAST_S = 5.0  # with less left, a part is not begun
TAIL_LINES = 25


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    limit_s: float
    command: Sequence[str]
    measures: bool = False  # takes --json FILE, and appends rows of gpu_timing.Row to it


@dataclass
class Outcome:
    name: str
    what: str
    state: str  # "passed", "failed …" or "not run: …"
    seconds: float
    command: str
    last_line: str = ""


def parts() -> list[Part]:
    python = sys.executable
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]
    install += ["-C", "cmake.define.CMAKE_CUDA_ARCHITECTURES=native"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "86", "--report-api-errors", "no"]
    kernels_once = [python, "-m", "tests.gpu.sanitized"]
    return [
        Part("build", "pycomm with CUDA code for this GPU", 200, install),
        Part("tests", "tests/gpu", 140, [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]),
        Part("memcheck", "compute-sanitizer memcheck", 50, [*sanitizer, "--tool", "memcheck", *kernels_once]),
        Part("racecheck", "compute-sanitizer racecheck", 50, [*sanitizer, "--tool", "racecheck", *kernels_once]),
        Part("kernels", "kernels beside torch's", 60, [python, "benchmarks/gpu_kernels.py"], measures=True),
        Part("matmul", "overlapped products", 60, [python, "benchmarks/gpu_matmul.py"], measures=True),
    ]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYCOMM_CUDA": "ON",
        "MAX_JOBS": str(os.cpu_count() or 1),
        "PYTHONPATH": str(ROOT),
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # hardware queues: streams of virtual ranks seldom share one
        "PYTHONUNBUFFERED": "1",
    }


def missing_gpu() -> str | None:
    """Why there is no GPU to work with, asked of the driver itself; None: there is one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no GPU (no libcuda.so.1)"
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "no GPU (the driver finds none)"
    return None


def run_part(part: Part, out: Path, limit_s: float) -> Outcome:
    """Run it in a process group of its own, which is gone afterwards; output goes to OUT/<name>.log."""
    command = list(part.command)
    if part.measures:
        command += ["--json", str(out / "rows.jsonl")]
    env = environment()
    if "compute-sanitizer" in command:
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor is an allocation, whose ends memcheck knows
    log = out / f"{part.name}.log"
    started = time.monotonic()
    state = "passed"
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        except OSError as error:
            state = f"failed: {error}"
        else:
            try:
                status = process.wait(limit_s)
                if status != 0:
                    state = f"failed with exit status {status}"
            except subprocess.TimeoutExpired:
                state = f"failed: not over after {limit_s:.0f} s"
            finally:
                end_group(process)
    lines = log.read_text(errors="replace").splitlines()
    outcome = Outcome(part.name, part.what, state, time.monotonic() - started, " ".join(command))
    outcome.last_line = next((line for line in reversed(lines) if line.strip()), "")
    if state != "passed":
        print("\n".join(lines[-TAIL_LINES:]), flush=True)
    return outcome


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(chosen: Sequence[Part], out: Path, why_not: str | None, total_s: float = TOTAL_S) -> list[Outcome]:
    started, outcomes = time.monotonic(), []
    for part in chosen:
        left_s = total_s - (time.monotonic() - started)
        reason = why_not or ("no time left" if left_s < LEAST_S else None)
        if reason is not None:
            outcome = Outcome(part.name, part.what, f"not run: {reason}", 0.0, " ".join(part.command))
        else:
            print(f"::: {part.name}: {part.what}", flush=True)
            outcome = run_part(part, out, min(part.limit_s, left_s))
        print(f"::: {part.name} {outcome.state} ({outcome.seconds:.0f} s) {outcome.last_line}", flush=True)
        outcomes.append(outcome)
    return outcomes


def machine() -> dict[str, str]:
    """What the results were measured on, as far as it can be told."""

    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return done.stdout.strip() or "unknown"

    torch_line = "import torch; print(torch.__version__, 'CUDA', torch.version.cuda)"
    return {
        "gpu": said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version").splitlines()[-1],
        "torch": said(sys.executable, "-c", torch_line),
        "python": platform.python_version(),
        "commit": said("git", "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_rows(out: Path) -> list[dict[str, object]]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(outcomes: Sequence[Outcome], rows: Sequence[dict[str, object]], where: dict[str, str]) -> str:
    lines = [", ".join(f"{name}: {value}" for name, value in where.items()), ""]
    lines += ["| part | result | seconds | command |", "|---|---|---|---|"]
    lines += [f"| {o.what} | {o.state}: {o.last_line} | {o.seconds:.0f} | `{o.command}` |" for o in outcomes]
    lines += ["", "| question | result | target | met | detail |", "|---|---|---|---|---|"]
    for row in rows:
        met = {True: "yes", False: "no", None: ""}[row["met"]]  # type: ignore[index]
        lines.append(
            f"| {row['question']} | {row['value']:.4g} {row['unit']} | {row['target']} | {met} | {row['detail']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--parts", default=",".join(part.name for part in parts()), help="which, in that order")
    options = parser.parse_args()
    known = {part.name: part for part in parts()}
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no part {', '.join(unknown)}: they are {', '.join(known)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").unlink(missing_ok=True)
    outcomes = run([known[name] for name in names], out, missing_gpu())
    rows, where = read_rows(out), machine()
    text = table(outcomes, rows, where)
    results = {"machine": where, "parts": [vars(outcome) for outcome in outcomes], "rows": rows}
    (out / "gpu_results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "gpu_results.md").write_text(text)
    print("\n" + text)
    passed = sum(outcome.state == "passed" for outcome in outcomes)
    missed = sum(row["met"] is False for row in rows)
    print(f"{passed} of {len(outcomes)} parts passed, {len(rows)} figures measured, {missed} below their target")
    return 0 if passed == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
