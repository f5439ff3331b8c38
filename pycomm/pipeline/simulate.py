"""How long a schedule takes, event by event, if every action's cost is known.

Two models of the network. Overlapped (the default): a transfer takes ``comm`` seconds beside the computation, and its
sender goes on. Not overlapped: transfers stand in each rank's order, both ends are busy with them, and a group's
progress together, as on one NCCL stream.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from pycomm.errors import ScheduleError
from pycomm.pipeline.actions import COMPUTE, Action, Schedule, held_after, mate, steps

__all__ = ["Costs", "Span", "Timeline", "measured_costs", "simulate", "transfer_s"]

Cost = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Seconds. A number holds for all stages, a list has one for each.

    Attributes:
        f: forward of one micro-batch through one stage.
        b: gradient of its input.
        w: gradients of its weights; "BW" costs b + w.
        comm: transfer between neighbouring stages on different ranks, either direction; a list has one for each
            boundary, entry s for the one between stages s and s + 1.
        overlap: transfers run beside computation; see the module.
    """

    f: Cost = 1.0
    b: Cost = 1.0
    w: Cost = 1.0
    comm: Cost = 0.0
    overlap: bool = True

    def of(self, action: Action) -> float:
        """Seconds of a computation."""
        return sum(_pick(getattr(self, kind.lower()), action.stage) for kind in action.kind)

    def of_boundary(self, stage: int) -> float:
        """Seconds of a transfer between ``stage`` and the next."""
        return _pick(self.comm, stage)


@dataclass(frozen=True)
class Span:
    """An action from ``start`` to ``end``, in seconds. ``cause``: what it waited for, (rank, index) of a span."""

    action: Action
    start: float
    end: float
    cause: tuple[int, int] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Timeline:
    """What every rank did and when; simulated or measured.

    Attributes:
        ranks: one list of spans a rank, by start.
    """

    ranks: list[list[Span]]

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max(self._times("end"), default=0.0) - min(self._times("start"), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """1 - (seconds of computation) / (ranks * makespan)."""
        busy = sum(s.end - s.start for spans in self.ranks for s in spans if s.action.kind in COMPUTE)
        return 1 - busy / (len(self.ranks) * self.makespan) if self.makespan else 0.0

    @property
    def peak_activations(self) -> list[int]:
        """Of each rank, the most stage-microbatches held at once, each from its F to its last B or W."""
        return [max((n for _, n in held_after([s.action for s in spans])), default=0) for spans in self.ranks]

    def critical_path(self) -> list[tuple[int, Action]]:
        """(rank, action) of a chain without slack from the first start to the last end: to be faster, shorten these."""
        ends = [(span.end, rank, index) for rank, spans in enumerate(self.ranks) for index, span in enumerate(spans)]
        path = []
        at: tuple[int, int] | None = max(ends)[1:] if ends else None
        while at is not None:
            span = self.ranks[at[0]][at[1]]
            path.append((at[0], span.action))
            at = span.cause
        return path[::-1]

    def svg(self, path: str | os.PathLike[str]) -> None:
        """Write a Gantt chart; :func:`pycomm.pipeline.draw.svg` draws several on one axis."""
        from pycomm.pipeline import draw  # draw knows timelines; this is a convenience on top

        draw.svg({"": self}, path)

    def _times(self, which: str) -> list[float]:
        return [getattr(span, which) for spans in self.ranks for span in spans]


def transfer_s(num_bytes: float, bytes_per_s: float, latency_s: float = 0.0) -> float:
    """Seconds of a message of ``num_bytes``, for :class:`Costs`."""
    return latency_s + num_bytes / bytes_per_s


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run ``schedule`` in order on every rank; each action starts once its rank is free and its input is there.

    Args:
        schedule: transfers may be left out where they overlap with computation.
        costs: default: one second for each of F, B and W, transfers for nothing.

    Raises:
        ScheduleError: ranks wait for each other; names what each waits for.
    """
    run = _Run(schedule, costs or Costs())
    while run.advance():
        pass
    run.check_finished()
    return Timeline(run.spans)


class _Run:
    """The state of a simulation: how far every rank is."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule = schedule
        self.costs = costs
        self.spans: list[list[Span]] = [[] for _ in schedule.ranks]
        self._todo = [
            steps([a for a in actions if a.kind in COMPUTE or not costs.overlap]) for actions in schedule.ranks
        ]
        self._next = [0] * len(schedule.ranks)
        self._done: dict[tuple[str, int, int], tuple[int, int]] = {}  # computations and receives: where their spans are
        # Transfers: when their rank got there, and the span before.
        self._posted: dict[tuple[str, int, int], tuple[float, tuple[int, int] | None]] = {}

    def advance(self) -> bool:
        """One round over the ranks; False if none could do anything."""
        moved = False
        for rank, todo in enumerate(self._todo):
            while self._next[rank] < len(todo) and self._step(rank, todo[self._next[rank]]):
                self._next[rank] += 1
                moved = True
        return moved

    def check_finished(self) -> None:
        stuck = [
            f"rank {rank} at {todo[self._next[rank]][0]}"
            for rank, todo in enumerate(self._todo)
            if self._next[rank] < len(todo)
        ]
        if stuck:
            raise ScheduleError(f"the ranks wait for each other: {'; '.join(stuck)}; verify() names the cycle")

    def _step(self, rank: int, step: tuple[Action, ...]) -> bool:
        free = self.spans[rank][-1].end if self.spans[rank] else 0.0
        if step[0].kind not in COMPUTE:
            return self._transfer(rank, step, free)
        start, cause = free, self._last(rank)
        for key, delay in self._needs(step[0]):
            if key not in self._done:
                return False
            at = self._done[key]
            ready = self.spans[at[0]][at[1]].end + delay
            if ready > start:
                start, cause = ready, at
        self._add(rank, Span(step[0], start, start + self.costs.of(step[0]), cause))
        return True

    def _transfer(self, rank: int, step: tuple[Action, ...], free: float) -> bool:
        for action in step:
            self._posted.setdefault(action.key, (free, self._last(rank)))
        if any(mate(action) not in self._posted for action in step):
            return False
        # The group ends, for all that wait for it, with its last transfer.
        end, cause = free, self._posted[step[0].key][1]
        for action in step:
            met, later = max(self._posted[action.key], self._posted[mate(action)], key=lambda posted: posted[0])
            arrival = met + self.costs.of_boundary(min(action.stage, mate(action)[1]))
            if arrival > end:
                end, cause = arrival, later
        for action in step:
            self._add(rank, Span(action, free, end, cause))
        return True

    def _last(self, rank: int) -> tuple[int, int] | None:
        return (rank, len(self.spans[rank]) - 1) if self.spans[rank] else None

    def _add(self, rank: int, span: Span) -> None:
        self._done[span.action.key] = (rank, len(self.spans[rank]))
        self.spans[rank].append(span)

    def _needs(self, action: Action) -> list[tuple[tuple[str, int, int], float]]:
        """What must be done before a computation, and seconds from its end until the result is here."""
        kind, stage, i = action.key
        if kind == "W":
            return [(("B", stage, i), 0.0)]
        needs = [] if kind == "F" else [(("F", stage, i), 0.0)]
        source = stage - 1 if kind == "F" else stage + 1
        if 0 <= source < self.schedule.num_stages:
            boundary = min(stage, source)
            if self.schedule.crosses(boundary) and not self.costs.overlap:
                return [*needs, (("RECV_F" if kind == "F" else "RECV_B", stage, i), 0.0)]
            delay = self.costs.of_boundary(boundary) if self.schedule.crosses(boundary) else 0.0
            needs.append(((self._producer(kind, source, i), source, i), delay))
        return needs

    def _producer(self, kind: str, stage: int, i: int) -> str:
        if kind == "F":
            return "F"
        return "BW" if ("BW", stage, i) in self._done else "B"


def measured_costs(timelines: Sequence[Timeline], num_stages: int, comm: float | Sequence[float] = 0.0) -> Costs:
    """The mean seconds of each stage's F, B and W over micro-batches, in the timelines of middling length.

    The mean, since what follows one after the other takes the sum; of the middle half of the timelines, as sorted by
    makespan, since a pause of the whole machine is no cost of a stage.

    Where backward is in one piece (BW), half of it counts as B and half as W; their sum is what matters there.

    Args:
        timelines: measured ones.
        num_stages: of the model.
        comm: of a transfer, as :class:`Costs` takes it; spans do not show it.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    by_length = sorted(timelines, key=lambda timeline: timeline.makespan)
    aside = len(by_length) // 4
    for timeline in by_length[aside : len(by_length) - aside]:
        for spans in timeline.ranks:
            for span in spans:
                seconds.setdefault((span.action.kind, span.action.stage), []).append(span.end - span.start)
    typical = {place: fmean(values) for place, values in seconds.items()}
    stages = range(num_stages)
    whole = [typical.get(("BW", stage), 0.0) / 2 for stage in stages]
    return Costs(
        f=[typical[("F", stage)] for stage in stages],
        b=[typical.get(("B", stage), whole[stage]) for stage in stages],
        w=[typical.get(("W", stage), whole[stage]) for stage in stages],
        comm=comm,
    )


def _pick(cost: Cost, stage: int) -> float:
    return cost[stage] if isinstance(cost, Sequence) else cost
