"""Passes that complete a schedule: weight gradients into bubbles, then transfers between ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import groupby

from pycomm.errors import ScheduleError
from pycomm.pipeline.actions import COMPUTE, Action, Schedule, mate
from pycomm.pipeline.simulate import Costs, simulate

__all__ = ["lower", "place_weight_gradients"]


def lower(schedule: Schedule) -> Schedule:
    """Add the transfers to a schedule of computations.

    All events are put into one order in time, that of a run with equal costs, and every rank's list is its part of
    that order. A transfer is one event for its sender and its receiver, so the sender's place decides the receiver's.
    Whatever blocks until it is matched can then not deadlock: the earliest event that has not happened yet always can.
    Transfers that happen at one time and share ranks form a group.

    Raises:
        ScheduleError: it has transfers already, or the ranks wait for each other.

    Ref: the sender inserts the peer's receive as in torch.distributed.pipelining; the order in time is ours.
    """
    if any(action.kind not in COMPUTE for actions in schedule.ranks for action in actions):
        raise ScheduleError("lower() adds transfers to a schedule of computations; this one has some already")
    lowered: list[list[Action]] = [[] for _ in schedule.ranks]
    next_group = 0
    for _, events in groupby(sorted(_events(schedule)), key=lambda event: event[0]):
        sends: list[Action] = []
        starts: list[tuple[int, Action]] = []
        for _, is_start, rank, _, action in events:
            if is_start:
                starts.append((rank, action))
            else:
                sends.append(action)
        for batch in _that_share_ranks(sends, schedule.rank_of):
            group = None if len(batch) == 1 else next_group
            next_group += len(batch) > 1
            for send in batch:
                for kind, stage, i in (send.key, mate(send)):
                    lowered[schedule.rank_of[stage]].append(Action(kind, stage, i, group))
        for rank, action in starts:
            lowered[rank].append(action)
    return Schedule(lowered, schedule.rank_of, schedule.num_microbatches, schedule.memory_bound)


def _events(schedule: Schedule) -> Iterator[tuple[float, bool, int, int, Action]]:
    """(time, whether a computation starts rather than is sent, rank, index, action); sends come first at one time."""
    for rank, spans in enumerate(simulate(schedule, Costs()).ranks):
        for index, span in enumerate(spans):
            kind, stage, i = span.action.key
            yield span.start, True, rank, index, span.action
            if kind == "F" and stage + 1 < schedule.num_stages and schedule.crosses(stage):
                yield span.end, False, rank, index, Action("SEND_F", stage, i)
            if kind in ("B", "BW") and stage > 0 and schedule.crosses(stage - 1):
                yield span.end, False, rank, index, Action("SEND_B", stage, i)


def _that_share_ranks(sends: list[Action], rank_of: list[int]) -> list[list[Action]]:
    """Simultaneous sends, put together where they have ranks in common, directly or through others."""
    batches: list[tuple[set[int], list[Action]]] = []
    for send in sends:
        ranks, batch = {rank_of[send.stage], rank_of[mate(send)[1]]}, [send]
        apart = []
        for other in batches:
            if other[0] & ranks:
                ranks, batch = ranks | other[0], other[1] + batch
            else:
                apart.append(other)
        batches = [*apart, (ranks, batch)]
    return [batch for _, batch in batches]


def place_weight_gradients(schedule: Schedule) -> Schedule:
    """Give every B its W: where its rank would idle, or where the memory bound lets no F pass before it.

    Runs the schedule with equal costs. An F, or a B, that can start does; else the oldest W that waits does.

    Args:
        schedule: computations with B but without W, and with a memory bound.
    """
    bound = schedule.memory_bound
    assert bound is not None
    run = _Placement(schedule, bound)
    while any(run.todo):
        start, rank, action = min(run.candidates(), default=(0, -1, None))
        if action is None:
            raise ScheduleError("the ranks wait for each other, or a memory bound is too small for its order")
        run.do(start, rank, action)
    for rank, waiting in enumerate(run.waiting):
        run.placed[rank] += waiting
    return Schedule(run.placed, schedule.rank_of, schedule.num_microbatches, bound)


class _Placement:
    """A run with costs of one, in order of start; ranks fill the time in which they would wait with W."""

    def __init__(self, schedule: Schedule, bound: list[int]) -> None:
        self.todo = [deque(actions) for actions in schedule.ranks]
        self.placed: list[list[Action]] = [[] for _ in schedule.ranks]
        self.waiting: list[deque[Action]] = [deque() for _ in schedule.ranks]
        self._num_stages = schedule.num_stages
        self._bound = bound
        self._free = [0] * len(bound)
        self._held = [0] * len(bound)
        self._end: dict[tuple[str, int, int], int] = {}

    def candidates(self) -> Iterator[tuple[int, int, Action]]:
        """(start, rank, action): what each rank would do next, as far as it is known."""
        for rank, todo in enumerate(self.todo):
            ready = self._ready(todo[0]) if todo else None
            if todo and todo[0].kind == "F" and self._held[rank] >= self._bound[rank]:
                ready = None
            start = None if ready is None else max(ready, self._free[rank])
            # All that starts earlier is decided by now, so an input that is not known yet comes no earlier than W ends.
            if self.waiting[rank] and start != self._free[rank]:
                yield self._free[rank], rank, self.waiting[rank][0]
            elif start is not None:
                yield start, rank, todo[0]

    def do(self, start: int, rank: int, action: Action) -> None:
        self._free[rank] = self._end[action.key] = start + 1
        self.placed[rank].append(action)
        if action.kind == "W":
            self.waiting[rank].popleft()
            self._held[rank] -= 1
            return
        self.todo[rank].popleft()
        if action.kind == "F":
            self._held[rank] += 1
        else:
            self.waiting[rank].append(Action("W", action.stage, action.microbatch))

    def _ready(self, action: Action) -> int | None:
        kind, stage, i = action.key
        source = stage - 1 if kind == "F" else stage + 1
        needs = [] if kind == "F" else [("F", stage, i)]
        if 0 <= source < self._num_stages:
            needs.append((kind, source, i))
        ends = [self._end.get(need) for need in needs]
        return None if None in ends else max((end for end in ends if end is not None), default=0)
