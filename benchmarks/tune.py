"""Other thresholds of the host transport beside those in use, measured here: which value of PYCOMM_TUNE is better?

``python benchmarks/tune.py --ranks 2 --thresholds eager_bytes,slice_bytes``

Every value is a contender of the harness, a communicator of its own in the same processes, and so is the value in use
a second time: how it differs from itself is the noise. docs/tuning.md has the rules.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from command_line import Options
from contenders import CONTENDERS
from harness import Samples, Suite, rows_of, sizes_of
from host import describe_host, load_warning
from report import Report

from pycomm import _C, env
from pycomm.backends.shm import tuning_here

FACTORS = (0.25, 0.5, 2, 4)  # of the value in use
MOST_BYTES = 64 << 20  # of a message; what only still larger ones would show is not looked for
GAIN = 0.05  # less than this is not worth a setting
IN_USE, AGAIN = "pycomm", "pycomm again"


@dataclass(frozen=True)
class Workload:
    """What a threshold decides about: an operation of the harness on these sizes, and the contender's memory."""

    operation: str
    contender: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Ratio:
    """Time over that of the value in use, turn by turn: median, and what one turn in ten is below and above."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} … {self.high:.2f})"


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
    def sizes(*factors: float, ranks: int = 1) -> tuple[int, ...]:
        return tuple(max(64, min(int(in_use[name] * factor) // ranks, MOST_BYTES)) for factor in factors)

    kinds = ("pycomm", "pycomm-ordinary")
    if name == "slice_bytes":
        return [Workload("all_reduce", kinds[1], (64 << 10, 512 << 10, 4 << 20, 16 << 20))]
    if name == "one_shot_bytes":  # it counts the bytes of all ranks
        return [Workload("all_reduce", kind, sizes(0.5, 1, 2, 4, ranks=num_ranks)) for kind in kinds]
    if name == "cached_bytes":  # of all ranks, too
        return [Workload("ping_pong", kinds[1], sizes(0.5, 1.5, 3, ranks=num_ranks))]
    if name == "eager_bytes":
        return [Workload("ping_pong", kinds[1], sizes(0.5, 1, 2, 4))]
    return [Workload("ping_pong", kinds[1], (64 << 10, 1 << 20, 16 << 20))]


def tunings(name: str, values: Sequence[int]) -> dict[str, str]:
    """PYCOMM_TUNE of each contender: the value in use, the others, the value in use again."""
    in_use = setting({})
    others = {f"{name}={value}": setting({name: value}) for value in values}
    return {IN_USE: in_use, **others, AGAIN: f"{in_use},"}  # another text, for a communicator of its own


def setting(better: dict[str, int]) -> str:
    """PYCOMM_TUNE as it is here, with these values."""
    return ",".join(f"{name}={value}" for name, value in {**env.tune(), **better}.items())


def ratio(sample: Samples, base: Samples) -> Ratio:
    pairs = zip(sample.medians_us(), base.medians_us(), strict=False)  # who failed in the middle has fewer turns
    ratios = [mine / theirs for mine, theirs in pairs]
    deciles = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios * 2
    return Ratio(statistics.median(ratios), deciles[0], deciles[-1])


def better_value(ratios: Sequence[dict[str, Ratio]], names: Sequence[str]) -> str | None:
    """Which of ``names`` is clearly faster on some workload and clearly slower on none; None: none is.

    Clearly: in nine of ten turns, by GAIN, and by more than nine of ten turns in which the value in use differs from
    itself. Of several, the one with the least product of medians.

    Args:
        ratios: of each size of each workload, by contender.
    """
    best, best_product = None, 1.0
    for name in names:
        faster = slower = False
        product = 1.0
        for of_contender in ratios:
            if name not in of_contender or AGAIN not in of_contender:
                break
            found, itself = of_contender[name], of_contender[AGAIN]
            faster |= found.high < min(1 - GAIN, itself.low)
            slower |= found.low > max(1 + GAIN, itself.high)
            product *= found.median
        else:
            if faster and not slower and product < best_product:
                best, best_product = name, product
    return best


def measure(name: str, options: Options, report: Report) -> tuple[int | None, list[str]]:
    """All workloads of one threshold. Returns the value that is clearly better than the one in use, and who failed."""
    in_use = tuning_here(options.ranks)
    values = alternatives(name, in_use, options.ranks)
    all_ratios: list[dict[str, Ratio]] = []
    lost: list[str] = []
    for workload in workloads(name, in_use, options.ranks):
        report.say(f"# {name}: {in_use[name]} in use, {workload.operation} of {workload.contender}")
        with Suite(options, report, [CONTENDERS[workload.contender]], tunings(name, values)) as suite:
            suite.start()
            for num_bytes in sizes_of(workload.operation, replace(options, sizes=workload.sizes), report):
                samples = suite.measure(workload.operation, num_bytes)
                report.rows(rows_of(f"tune {name}", workload.operation, options, num_bytes, samples))
                ratios = {key: ratio(sample, samples[IN_USE]) for key, sample in samples.items() if IN_USE in samples}
                all_ratios.append(ratios)
                others = (f"{contender} {found}" for contender, found in list(ratios.items())[1:])
                report.say(f"#   nine of ten turns: {', '.join(others)}")
                if options.json is not None:
                    line = {"threshold": name, "bytes": num_bytes, "ratios": {k: asdict(r) for k, r in ratios.items()}}
                    with options.json.open("a") as file:
                        print(json.dumps(line), file=file)
        lost += suite.lost
    best = better_value(all_ratios, [f"{name}={value}" for value in values])
    return None if best is None else int(best.partition("=")[2]), lost


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = tuple(_C.tuning(2, {}))
    parser.add_argument("--ranks", type=int, default=2, help="processes of each contender, as many as the job has")
    parser.add_argument("--thresholds", default=",".join(known), help="which ones to look at (default: all)")
    parser.add_argument("--turns", type=int, default=20, help="turns of each value per size")
    parser.add_argument("--seconds", type=float, default=0.03, help="wall time of a turn")
    parser.add_argument("--iters", type=int, default=None, help="iterations of a turn, instead of --seconds")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write JSON lines")
    given = parser.parse_args(argv)
    names = given.thresholds.split(",")
    if not set(names) <= set(known):
        parser.error(f"--thresholds: there are {', '.join(known)}")
    if not 2 <= given.ranks <= _C.MAX_RANKS or given.turns < 1:
        parser.error(f"--ranks must be from 2 to {_C.MAX_RANKS}, --turns at least 1")
    try:
        tuning_here(given.ranks)
    except ValueError as error:  # PYCOMM_TUNE does not read as it should
        parser.error(str(error))
    operations = ("all_reduce", "ping_pong")
    fixed = ("float32", (), given.turns, given.seconds, given.iters, 120.0)
    options = Options(given.ranks, operations, (), *fixed, json=given.json)
    report = Report("tune", operations, given.ranks, None, None)
    report.header(describe_host(), {}, load_warning())
    if given.json is not None:
        given.json.write_text("")
    found = {name: measure(name, options, report) for name in names}
    better = {name: value for name, (value, _) in found.items() if value is not None}
    if better:
        report.say(f"Clearly better here: set PYCOMM_TUNE={setting(better)} for all ranks.")
    else:
        report.say("Nothing is clearly better than what is in use.")
    return 1 if any(lost for _, lost in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
