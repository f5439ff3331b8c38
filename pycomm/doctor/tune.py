"""``pycomm doctor --tune``: other thresholds of the host transport beside those in use, measured here, in turns.

A ratio is the time of an alternative over that of what is in use in the same round. What is called clearly better is so
in nine of ten rounds and by more than the thresholds in use differ from themselves; docs/tuning.md has the rules.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pycomm import _C, env
from pycomm.backends.shm import tuning_here
from pycomm.doctor.checks import format_bytes
from pycomm.doctor.ranks import failure, started_ranks

NUM_ROUNDS = 40
TIMEOUT_S = 600.0  # of all of it; a minute or two is usual
FACTORS = (0.25, 0.5, 2, 4)
MOST_BYTES = 64 << 20  # of a message; what only still larger ones would show is not looked for
GAIN = 0.05  # less than this is not worth a setting


class TuneError(RuntimeError):
    """The ranks did not finish; the message says what they said."""


@dataclass(frozen=True)
class Workload:
    """One operation of float32: "all_reduce", or "send", there and back between pairs of ranks."""

    call: str
    memory: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.call}, {self.memory}, {format_bytes(self.bytes)}"


@dataclass(frozen=True)
class Ratio:
    """Of the rounds: median, and the values that one in ten lies below and above."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """A workload: seconds with the value in use, its ratio to itself measured once more, and each other value's."""

    workload: Workload
    time_s: float
    itself: Ratio
    ratios: list[Ratio]


@dataclass(frozen=True)
class Threshold:
    """One threshold. ``values``: the one in use first. ``better``: the value to set, None if none is clearly better."""

    name: str
    values: list[int]
    measured: list[Measured] = field(default_factory=list)
    better: int | None = None


def alternatives(name: str, in_use: dict[str, int], num_ranks: int) -> list[int]:
    """The values to try beside the one in use: quarters to fourfold, as far as they are possible."""
    values = []
    for factor in FACTORS:
        value = int(in_use[name] * factor) // 64 * 64
        try:
            _C.tuning(num_ranks, {name: value})
        except ValueError:  # below its least or above its most
            continue
        if value not in (0, in_use[name]):
            values.append(value)
    return values


def workloads(name: str, in_use: dict[str, int], num_ranks: int) -> list[Workload]:
    """What a threshold decides about."""
    if name == "slice_bytes":
        return [Workload("all_reduce", "ordinary", size << 10) for size in (64, 512, 4096, 16384)]
    if name == "one_shot_bytes":  # it counts the bytes of all ranks
        sizes = [max(16, int(in_use[name] * factor) // num_ranks // 16 * 16) for factor in (0.5, 1, 2, 4)]
        return [Workload("all_reduce", memory, size) for memory in ("symmetric", "ordinary") for size in sizes]
    if name == "cached_bytes":
        sizes = [int(in_use[name] * factor) // num_ranks // 64 * 64 for factor in (0.5, 1.5, 3)]  # of all ranks
        return [Workload("send", "ordinary", max(64, min(size, MOST_BYTES))) for size in sizes]
    if name == "eager_bytes":
        return [
            Workload("send", "ordinary", max(64, int(in_use[name] * factor) // 64 * 64)) for factor in (0.5, 1, 2, 4)
        ]
    return [Workload("send", "ordinary", size << 10) for size in (64, 1024, 16384)]


def ratio(values: Sequence[float], bases: Sequence[float]) -> Ratio:
    """Of ``values`` to ``bases``, round by round."""
    ratios = [value / base for value, base in zip(values, bases, strict=True)]
    deciles = statistics.quantiles(ratios, n=10, method="inclusive")
    return Ratio(statistics.median(ratios), deciles[0], deciles[-1])


def better_value(values: Sequence[int], measured: Sequence[Measured]) -> int | None:
    """The alternative that is clearly faster on some workload and clearly slower on none, or None.

    Clearly: in nine of ten rounds, by GAIN, and by more than nine of ten rounds in which the value in use was measured
    against itself. Of several the one with the least product of medians.
    """
    best, best_product = None, 1.0
    for index, value in enumerate(values):
        faster = slower = False
        product = 1.0
        for one in measured:
            found = one.ratios[index]
            faster |= found.high < min(1 - GAIN, one.itself.low)
            slower |= found.low > max(1 + GAIN, one.itself.high)
            product *= found.median
        if faster and not slower and product < best_product:
            best, best_product = value, product
    return best


def tune(
    num_ranks: int,
    timeout_s: float,
    *,
    num_rounds: int = NUM_ROUNDS,
    names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    worker: str = "pycomm.doctor.tune_worker",
) -> list[Threshold]:
    """Measure on ``num_ranks`` processes of this machine; takes about a minute.

    Args:
        timeout_s: the longest that all of it may take.
        names: of the thresholds to look at; None: all.
        progress: called with the number of workloads done and of all.

    Raises:
        ValueError: PYCOMM_TUNE does not read as it should.
        TuneError: a rank failed.
    """
    in_use = tuning_here(num_ranks)
    thresholds = [Threshold(name, [in_use[name], *alternatives(name, in_use, num_ranks)]) for name in names or in_use]
    of_threshold = {t.name: workloads(t.name, in_use, num_ranks) for t in thresholds}
    groups = [
        {
            "thresholds": [{**in_use, t.name: value} for value in t.values],
            "workloads": [dataclasses.asdict(workload) for workload in of_threshold[t.name]],
        }
        for t in thresholds
    ]
    plan = json.dumps({"rounds": num_rounds, "groups": groups})
    total = sum(map(len, of_threshold.values()))
    of_ranks = _run(worker, num_ranks, timeout_s, plan, lambda done: progress(done, total))
    # Of each turn the slowest rank's time. The value in use comes first and, against itself, last.
    times = iter(
        [[list(map(max, *turns)) for turns in zip(*work, strict=True)] for work in zip(*of_ranks, strict=True)]
    )
    done = []
    for t in thresholds:
        measured = []
        for workload in of_threshold[t.name]:
            base, *others, again = next(times)
            ratios = [ratio(other, base) for other in others]
            measured.append(Measured(workload, statistics.median(base), ratio(again, base), ratios))
        done.append(dataclasses.replace(t, measured=measured, better=better_value(t.values[1:], measured)))
    return done


def _run(
    worker: str, num_ranks: int, timeout_s: float, plan: str, progress: Callable[[int], None]
) -> list[list[list[list[float]]]]:
    """[rank][workload][contender][round] seconds."""
    deadline = time.monotonic() + timeout_s
    with started_ranks(worker, num_ranks, [str(timeout_s), plan]) as ranks:
        outputs = []
        for rank, process in enumerate(ranks):
            assert process.stdout is not None
            assert process.stderr is not None
            last = ""
            for line in process.stdout:  # it ends with the process, whose waits end with the timeout
                last = line
                if rank == 0 and line.startswith('{"done"'):
                    progress(json.loads(line)["done"])
            process.wait(max(deadline - time.monotonic(), 1.0))
            said = failure(process, rank, process.stderr.read())
            if said:
                raise TuneError(said)
            outputs.append(json.loads(last)["times_s"])
        return outputs


def setting(thresholds: Sequence[Threshold]) -> str | None:
    """What to set PYCOMM_TUNE to, with what it says already; None: nothing is clearly better."""
    better = {t.name: t.better for t in thresholds if t.better is not None}
    return ",".join(f"{name}={value}" for name, value in {**env.tune(), **better}.items()) if better else None


def main(num_ranks: int, as_json: bool) -> int:
    """Measure and print; returns the exit code."""
    errors = Console(stderr=True)
    try:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=errors
        ) as bar:
            task = bar.add_task(f"measuring on {num_ranks} ranks", total=None)
            thresholds = tune(
                num_ranks, TIMEOUT_S, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
    except (TuneError, ValueError) as error:
        errors.print(f"pycomm doctor --tune: {error}", markup=False, highlight=False)
        return 1
    if as_json:
        found = {"ranks": num_ranks, "rounds": NUM_ROUNDS, "set": setting(thresholds)}
        print(json.dumps({**found, "thresholds": [dataclasses.asdict(t) for t in thresholds]}, indent=2))
    else:
        show(thresholds, Console())
    return 0


def show(thresholds: Sequence[Threshold], console: Console) -> None:
    for threshold in thresholds:
        table = Table(
            title=f"{threshold.name}: time in ratio to the value in use, nine of ten rounds", title_justify="left"
        )
        table.add_column("operation", no_wrap=True)
        table.add_column(f"{format_bytes(threshold.values[0])} (in use)", justify="right")
        for value in threshold.values[1:]:
            table.add_column(format_bytes(value), justify="right", style="green" if value == threshold.better else "")
        for one in threshold.measured:
            base = f"{one.time_s * 1e6:,.1f} µs {_span(one.itself)}"
            table.add_row(str(one.workload), base, *(f"{found.median:.2f} {_span(found)}" for found in one.ratios))
        console.print(table)
    set_to = setting(thresholds)
    if set_to is None:
        console.print("Nothing is clearly better than what is in use.")
    else:
        console.print(f"Clearly better here: set PYCOMM_TUNE={set_to} for all ranks.", markup=False, highlight=False)


def _span(found: Ratio) -> str:
    return f"({found.low:.2f} … {found.high:.2f})"
