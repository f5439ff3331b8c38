"""Ctrl-C at seeded moments of the first five seconds of ``pycomm pretrain``: ``make interrupts`` makes a hundred.

Rounds differ in the moment (a time, or an event and a short while after it), in who gets the signal (the process group,
as from a terminal, or the command alone) and in whether the tokenizer is trained first. Whatever the moment, the
command has to end with exit code 130, say nothing of tracebacks, and leave no process and no temporary file.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MARK = "PYCOMM_TEST_ROUND"  # an environment variable, by which processes of a round are found
END_S = 100.0  # for the command to end; torch's launcher kills workers after 30 s
AFTER_S = 10.0  # for the workers to be gone after that
EVENTS = ("workers", "training a byte-pair", "tokenizing", "text:", "run folder", "step 1/")


@dataclass(frozen=True)
class Moment:
    """When the signal comes: ``delay_s`` after ``event``, a text of the output; "": the command's first line."""

    event: str
    delay_s: float
    whole_group: bool
    new_cache: bool


@dataclass(frozen=True)
class Outcome:
    """``phase``: the last event before the signal; ``faults``: what should not be, empty if all is well."""

    moment: Moment
    phase: str
    seconds: float
    faults: list[str]


def moments(num_rounds: int, seed: int) -> list[Moment]:
    """Times and events in turns, so that every phase is hit on a slow machine too."""
    draw = random.Random(seed)
    found = []
    for number in range(num_rounds):
        event = "" if number % 2 else draw.choice(EVENTS)
        delay_s = draw.uniform(0.0, 0.5 if event else 5.0)
        # The tokenizer's lines appear only where there is no cache yet.
        new_cache = event in EVENTS[1:3] or (not event and draw.random() < 0.5)
        found.append(Moment(event, delay_s, number % 4 < 2, new_cache))
    return found


def interrupt(moment: Moment, cache: Path, arguments: list[str]) -> Outcome:
    """One round in a folder of its own.

    Args:
        cache: of the tokenizer, for rounds that do not make it anew.
        arguments: of ``pycomm pretrain``.
    """
    scratch = Path(tempfile.mkdtemp(prefix="pycomm-interrupts-"))
    temporary, output = scratch / "tmp", scratch / "output"
    temporary.mkdir()
    mark = scratch.name
    environment = os.environ | {
        MARK: mark,
        "TMPDIR": str(temporary),
        "PYCOMM_CACHE_DIR": str(scratch / "cache" if moment.new_cache else cache),
        "PYTHONUNBUFFERED": "1",
    }
    command = [str(Path(sys.executable).with_name("pycomm")), "pretrain", *arguments, "--out", str(scratch / "run")]
    try:
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            return _interrupt(moment, process, output, temporary, mark)
        finally:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)
            process.wait()
    finally:
        shutil.rmtree(scratch)


def _interrupt(moment: Moment, process: subprocess.Popen[bytes], output: Path, temporary: Path, mark: str) -> Outcome:
    _until(lambda: process.poll() is not None or _takes_signals(process.pid), 60.0)
    reached = {
        "": lambda: True,
        "workers": lambda: len(marked(mark)) > 1,
    }.get(moment.event, lambda: moment.event in output.read_text())
    _until(lambda: process.poll() is not None or reached(), 60.0)
    time.sleep(moment.delay_s)
    text = output.read_text()
    workers = len(marked(mark)) > 1
    phase = next((event for event in EVENTS[:0:-1] if event in text), "workers" if workers else "command")
    began = time.monotonic()
    (os.killpg if moment.whole_group else os.kill)(process.pid, signal.SIGINT)
    faults = []
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        faults.append(f"the command did not end within {END_S:g} s")
    seconds = time.monotonic() - began
    if process.returncode != 130:
        faults.append(f"exit code {process.returncode}")
    left = _until(lambda: not marked(mark), AFTER_S)
    if not left:
        faults.append(f"processes left: {[_name(pid) for pid in marked(mark)]}")
    text = output.read_text()
    if "Traceback" in text:
        faults.append(f"a traceback: {text[text.index('Traceback') :].strip().splitlines()[-1]}")
    # torch's own cache has a folder there for good.
    if files := sorted(path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")):
        faults.append(f"temporary files left: {files}")
    return Outcome(moment, phase, seconds, faults)


def _until(holds: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _takes_signals(pid: int) -> bool:
    """Whether the command's first line has run: Python's own start, some 30 ms before, is not the command's."""
    status = Path(f"/proc/{pid}/status").read_text()
    blocked = next(line for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(blocked.split()[1], 16) >> (signal.SIGINT - 1) & 1)


def marked(mark: str) -> list[int]:
    """Processes of the round that are alive, wherever their sessions and parents are."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[-60:]
    except (FileNotFoundError, ProcessLookupError):
        return str(pid)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    phases: collections.Counter[str] = collections.Counter()
    num_bad = 0
    slowest_s = 0.0
    with tempfile.TemporaryDirectory(prefix="pycomm-interrupts-cache-") as cache:
        for number, moment in enumerate(moments(parsed.rounds, parsed.seed)):
            outcome = interrupt(moment, Path(cache), ["--nproc", "2", "--steps", "1000000"])
            phases[outcome.phase] += 1
            num_bad += bool(outcome.faults)
            slowest_s = max(slowest_s, outcome.seconds)
            said = "; ".join(outcome.faults) or "ok"
            print(
                f"{number:3} {moment.event or 'time':20} +{moment.delay_s:.2f} s "
                f"{'group' if moment.whole_group else 'alone'}  in {outcome.phase!r}, ended after "
                f"{outcome.seconds:.2f} s: {said}",
                flush=True,
            )
    print(f"{parsed.rounds} rounds, {num_bad} with faults, slowest end {slowest_s:.1f} s; by phase: {dict(phases)}")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
