"""``pycomm schedule``: show, check, predict and save a pipeline schedule."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pycomm.errors import ScheduleError
from pycomm.pipeline import draw
from pycomm.pipeline.actions import COMPUTE, Schedule
from pycomm.pipeline.lowering import lower
from pycomm.pipeline.schedules import NAMES, build
from pycomm.pipeline.simulate import Costs, simulate
from pycomm.pipeline.verify import slots_needed, verify

__all__ = ["main"]

EXIT_UNSOUND, EXIT_USAGE = 1, 2
MOST_ACTIONS = 1_000_000
MOST_S = 1e9


def main(args: Sequence[str]) -> int:
    """Run ``pycomm schedule`` with these arguments; returns the exit code: 1 for a schedule that is not sound."""
    parsed = _parser().parse_args(args)
    try:
        schedule = _schedule(parsed)
        verify(schedule)
        costs = Costs(parsed.f, parsed.b, parsed.w, parsed.comm)
        timeline = simulate(schedule, costs)
        if parsed.svg is not None:
            timeline.svg(parsed.svg)
        if parsed.csv is not None:
            schedule.to_csv(parsed.csv)
    except ScheduleError as error:
        print(f"pycomm schedule: not sound: {error}", file=sys.stderr)
        return EXIT_UNSOUND
    except (ValueError, OSError) as error:
        print(f"pycomm schedule: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(draw.text(timeline))
    print(f"makespan {timeline.makespan:.6g} s, bubble {timeline.bubble_fraction:.4f}")
    print(f"most stage-microbatches held at once, by rank: {timeline.peak_activations}")
    print(f"buffers per stage and direction: {slots_needed(schedule)}; free of deadlock on one stream")
    return 0


def _schedule(parsed: argparse.Namespace) -> Schedule:
    if parsed.name in NAMES:
        if parsed.ranks is None or parsed.microbatches is None:
            raise ValueError(f"{parsed.name} needs --ranks and --microbatches")
        if parsed.ranks * parsed.microbatches * parsed.chunks > MOST_ACTIONS:
            raise ValueError(
                f"{parsed.ranks} ranks of {parsed.chunks} stages and {parsed.microbatches} micro-batches are more than "
                f"{MOST_ACTIONS:,} computations, which nobody would wait for; fewer micro-batches show the same pattern"
            )
        return build(parsed.name, parsed.ranks, parsed.microbatches, parsed.chunks)
    if not parsed.name.endswith(".csv"):
        raise ValueError(f"there is no schedule {parsed.name!r}; one of {', '.join(NAMES)}, or a .csv file")
    schedule = Schedule.from_csv(parsed.name)
    only_computes = all(action.kind in COMPUTE for actions in schedule.ranks for action in actions)
    return lower(schedule) if only_computes else schedule


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"it must be at least 1, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= MOST_S:  # nor is NaN
        raise argparse.ArgumentTypeError(f"it must be from 0 to {MOST_S:g} seconds, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pycomm schedule",
        description="Draw a pipeline schedule, prove it free of deadlock, and predict its time and bubble.",
    )
    parser.add_argument("name", help=f"{', '.join(NAMES)}, or a CSV file (rank,index,kind,stage,microbatch,group)")
    parser.add_argument("--ranks", type=_count, help="ranks of the pipeline")
    parser.add_argument("--microbatches", type=_count, help="parts of the batch")
    parser.add_argument("--chunks", type=_count, default=1, help="stages a rank, for interleaved_1f1b (default 1)")
    for cost, what in (("f", "forward"), ("b", "gradient of the input"), ("w", "gradients of the weights")):
        parser.add_argument(
            f"--{cost}", type=_seconds, default=1.0, metavar="S", help=f"seconds of a {what} (default 1)"
        )
    parser.add_argument("--comm", type=_seconds, default=0.0, metavar="S", help="seconds of a transfer (default 0)")
    parser.add_argument("--svg", metavar="FILE", help="write a Gantt chart")
    parser.add_argument("--csv", metavar="FILE", help="write the schedule, transfers included")
    return parser
