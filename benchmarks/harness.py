"""The driver of every benchmark here: alternates the contenders turn by turn and makes rows of their times.

A benchmark script is one call of ``main``, with the operations that it measures. The protocol, and what each column
means, is in README.md. Nothing here imports the libraries that are measured.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from command_line import Options, parse_arguments
from contenders import BOUND, CONTENDERS, Spec
from group import Group, GroupError, Reply, remove_traces
from host import describe_host, load_warning
from linux import available_memory_bytes
from operations import OPERATIONS
from report import Report, Row

_MAX_ITERATIONS = 500
_TRIAL_ITERATIONS = 4
_STOP_S, _INTERRUPTED_STOP_S = 10.0, 2.0
_REFERENCE = "pycomm"
_PREFIX = "pycomm-bench-"


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest-rank ``q``-quantile (0 < q <= 1) of ``values``: always one of them."""
    if not values:
        raise ValueError("percentile of no values")
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def bandwidths(num_bytes: int, time_us: float, bus_factor: float) -> tuple[float, float]:
    """algbw and busbw in GB/s (10**9 bytes): bytes over time, and that times the operation's factor."""
    algbw = num_bytes / time_us / 1e3
    return algbw, algbw * bus_factor


@dataclass
class Samples:
    """What one contender measured for one size: time of each iteration (the slowest rank's), and wrong elements."""

    times_us: list[float] = field(default_factory=list)
    wrong: int = 0
    iterations: int = 1  # of one turn
    trips: int = 1  # of one iteration

    def add(self, replies: Sequence[Reply]) -> None:
        times_us = (reply["times_us"] for reply in replies)
        self.times_us += [max(ranks) / self.trips for ranks in zip(*times_us, strict=True)]
        self.wrong += sum(reply["wrong"] for reply in replies)

    def medians_us(self) -> list[float]:
        """Of each turn."""
        starts = range(0, len(self.times_us), self.iterations)
        return [statistics.median(self.times_us[start : start + self.iterations]) for start in starts]


def _sweep(place: Path) -> None:
    """Remove what drivers of this user left that were killed too hard to clean up."""
    for stale in place.glob(f"{_PREFIX}*"):
        driver = stale.name.removeprefix(_PREFIX).partition("-")[0]
        if stale.stat().st_uid == os.getuid() and not Path("/proc", driver).exists():
            for directory in stale.iterdir():
                remove_traces(directory)
            stale.rmdir()


class Suite:
    """The groups of one run. Use as a context manager: leaving it, however, ends every process it started.

    Args:
        specs: the contenders.
        tunings: name -> PYCOMM_TUNE, of contenders that share the processes of each of ``specs`` in their place.
    """

    def __init__(
        self, options: Options, report: Report, specs: Sequence[Spec], tunings: Mapping[str, str] | None = None
    ) -> None:
        self._options, self._report, self._specs, self._tunings = options, report, specs, tunings or {}
        self._groups: list[Group] = []
        self.lost: list[str] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Suite:
        shm = Path("/dev/shm")  # Open MPI's shared segments become files in it; on a disk they would be slow
        place = shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(place)
        self._directory = tempfile.TemporaryDirectory(
            prefix=f"{_PREFIX}{os.getpid()}-", dir=place, ignore_cleanup_errors=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for group in self._groups:
            group.ask_to_stop()
        deadline = time.monotonic() + (_STOP_S if kind is None else _INTERRUPTED_STOP_S)
        for group in self._groups:
            group.wait_stopped(deadline)
        if self._directory is not None:
            self._directory.cleanup()

    def start(self) -> dict[str, str]:
        """Start every contender that is here and name those that are not. Returns name -> version."""
        assert self._directory is not None
        for spec in self._specs:
            missing = spec.missing()
            if missing is not None:
                self._report.note(missing)
                continue
            directory = Path(self._directory.name) / spec.name
            self._groups.append(Group(spec, self._options.ranks, directory, self._options.timeout_s))
            self._groups[-1].start()
        for group in list(self._groups):
            self._report.progress(f"starting {group.name}")
            with self._losing(group, {}):
                group.wait_ready()
        if self._tunings:
            self._groups = [group.tuned(*tuning) for group in self._groups for tuning in self._tunings.items()]
        return {group.name: group.version for group in self._groups}

    def measure(self, operation: str, num_bytes: int) -> dict[str, Samples]:
        """All contenders on one size, turn by turn. A contender that fails is reported and left out from then on."""
        samples: dict[str, Samples] = {}
        if not self._fits(OPERATIONS[operation].buffer_bytes(num_bytes, self._options.ranks), num_bytes):
            return samples
        for group in list(self._groups):
            self._report.progress(f"{operation} {num_bytes} B: preparing {group.name}")
            with self._losing(group, samples):
                self._prepare(group, operation, num_bytes, samples)
        for turn in range(self._options.turns):
            for group in [group for group in self._groups if group.name in samples]:
                self._report.progress(f"{operation} {num_bytes} B, turn {turn + 1}/{self._options.turns}: {group.name}")
                with self._losing(group, samples):
                    sample = samples[group.name]
                    sample.add(group.request("turn", iterations=sample.iterations))
        for group in list(self._groups):
            with self._losing(group, {}):  # what it measured before it failed stands
                group.request("release")
        return samples

    def _fits(self, buffer_bytes: int, num_bytes: int) -> bool:
        """Every rank of every contender holds its buffers at once, and a library may hold a copy beside them."""
        needed = (buffer_bytes + num_bytes) * self._options.ranks * len(self._groups)
        available = available_memory_bytes()
        if needed > available:
            self._report.note(
                f"{num_bytes} bytes are not measured: {len(self._groups)} contenders need {needed / 2**30:.1f} GiB, "
                f"{available / 2**30:.1f} are free; ask for fewer --backends"
            )
        return needed <= available

    def _prepare(self, group: Group, operation: str, num_bytes: int, samples: dict[str, Samples]) -> None:
        """Allocate, try out, and choose how many iterations fill a turn; a cell that cannot be done is left out."""
        for reply in group.request("prepare", operation=operation, dtype=self._options.dtype, num_bytes=num_bytes):
            if "unsupported" in reply:
                self._report.not_available(operation, group.name, reply["unsupported"])
                return
        sample = samples[group.name] = Samples(trips=OPERATIONS[operation].trips)
        sample.wrong = sum(reply["wrong"] for reply in group.request("turn", iterations=1))  # pays for page faults
        trial = group.request("turn", iterations=_TRIAL_ITERATIONS)
        sample.wrong += sum(reply["wrong"] for reply in trial)
        wall_s = max(reply["wall_s"] for reply in trial) / (_TRIAL_ITERATIONS + 1)  # a turn begins with a warm-up
        fitting = max(2, min(_MAX_ITERATIONS, int(self._options.seconds / wall_s)))
        sample.iterations = self._options.iterations or fitting

    @contextmanager
    def _losing(self, group: Group, samples: dict[str, Samples]) -> Iterator[None]:
        """A contender that fails is reported and left out; the others go on."""
        try:
            yield
        except GroupError as error:
            self._groups.remove(group)
            self.lost.append(group.name)
            samples.pop(group.name, None)
            self._report.note(f"{error}\n    {group.name} is left out from here on")


def rows_of(bench: str, operation: str, options: Options, num_bytes: int, samples: dict[str, Samples]) -> list[Row]:
    """One row a contender, in the order of ``samples``; shares and ratios need bound and pycomm among them."""
    p50 = {name: percentile(sample.times_us, 0.50) for name, sample in samples.items()}
    bound, reference = p50.get(BOUND.name), p50.get(_REFERENCE)
    factor = OPERATIONS[operation].bus_factor(options.ranks)
    rows = []
    for name, sample in samples.items():
        algbw, busbw = bandwidths(num_bytes, p50[name], factor)
        rows.append(
            Row(
                bench=bench,
                backend=name,
                op=operation,
                ranks=options.ranks,
                dtype=options.dtype,
                bytes=num_bytes,
                time_us_p50=p50[name],
                time_us_p99=percentile(sample.times_us, 0.99),
                algbw_gbps=algbw,
                busbw_gbps=busbw,
                wrong=sample.wrong,
                bound_share=bound / p50[name] if bound is not None else None,
                ratio_to_pycomm=p50[name] / reference if reference is not None else None,
                iterations=len(sample.times_us),
            )
        )
    return rows


def sizes_of(operation: str, options: Options, report: Report) -> list[int]:
    """The sizes to measure ``operation`` at, ascending: those asked for, rounded down to what it can have."""
    op = OPERATIONS[operation]
    if not op.sized:
        return [0]
    sizes = {op.message_bytes(size, options.dtype, options.ranks) for size in options.sizes}
    if 0 in sizes:
        report.note(f"{operation}: a size that has no {options.dtype} for each of {options.ranks} ranks is left out")
    return sorted(sizes - {0})


def run(bench: str, options: Options) -> tuple[list[Row], list[str]]:
    """Measure what ``options`` asks for, printing and writing as it comes. Returns all rows, and who failed."""
    report = Report(bench, options.operations, options.ranks, options.json, options.plot)
    rows: list[Row] = []
    warning = load_warning()  # before our own processes add to it
    with Suite(options, report, [*(CONTENDERS[name] for name in options.backends), BOUND]) as suite:
        versions = suite.start()
        report.header(describe_host(), versions, warning)
        for operation in options.operations:
            for num_bytes in sizes_of(operation, options, report):
                new = rows_of(bench, operation, options, num_bytes, suite.measure(operation, num_bytes))
                report.rows(new)
                rows += new
    report.finish()
    return rows, suite.lost


def main(bench: str, operations: Sequence[str], description: str, sizes: str = "1K:256M") -> int:
    """A benchmark script. Returns the exit status: 1 where an element was wrong or a contender failed."""
    options = parse_arguments(None, description, operations, sizes)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        rows, lost = run(bench, options)
    except KeyboardInterrupt:
        print("interrupted; every process that was started is ended", file=sys.stderr)
        return 130
    return 1 if lost or not rows or any(row.wrong for row in rows) else 0
