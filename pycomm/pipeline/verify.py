"""Is a schedule sound? Proved before it runs, under the rules that NCCL really has.

Checked in this order, and each failure names the rank and the action:

1. *Complete*: every stage does F of every micro-batch once, and either BW or B and W once, on its own rank.
2. *Matched*: where neighbouring stages are on different ranks, one send and one receive in each direction for each
   micro-batch, and nothing else. NCCL knows no tags, so the sends of one rank to another must also come in the order of
   that one's receives.
3. *Free of deadlock*: sends and receives block their stream until they are matched; a group's progress together, and
   the group blocks until all are done; a receive needs a free buffer. Everything that waits for something else is an
   edge of a graph, and a cycle in it is a deadlock. Data used before it is there, or W before B, is a cycle too: the
   earlier place in the rank's order waits for the later one.
4. *Within memory*: no rank holds more stage-microbatches than the schedule promises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pycomm.errors import ScheduleError
from pycomm.pipeline.actions import COMPUTE, KINDS, TRANSFERS, Action, Schedule, held_after, last_uses, mate, steps

__all__ = ["buffers", "slots_needed", "verify"]

Key = tuple[str, int, int]


def verify(schedule: Schedule, slots: int | None = None, streams: int = 1) -> None:
    """Return if ``schedule`` is sound; see the module.

    Args:
        schedule: with transfers, as :func:`pycomm.pipeline.build` and :func:`pycomm.pipeline.lower` return it.
        slots: buffers that a stage has for its inputs, and as many for its output's gradients. One is taken by a
            receive and free again after the micro-batch's last B or W. None: as many as it takes.
        streams: 1: a rank does one thing after the other. 2: transfers have a stream beside the computation. 3: and
            forward transfers one of their own, on a communicator of their own.

    Raises:
        ScheduleError: it is not; the message names the rank, the action and, for a deadlock, the cycle.
        ValueError: ``slots`` or ``streams`` is out of range.
    """
    if streams not in (1, 2, 3):
        raise ValueError(f"streams is {streams}: it is 1, 2 or 3")
    if slots is not None and slots < 1:
        raise ValueError(f"slots is {slots}: at least one buffer is needed")
    _check_places(schedule)
    _check_computations(schedule)
    _check_transfers(schedule, streams)
    _check_progress(schedule, slots, streams)
    _check_memory(schedule)


def buffers(schedule: Schedule) -> dict[tuple[str, int], int]:
    """(RECV_F or RECV_B, receiving stage) -> the most that the stage has received and not released at once."""
    most: dict[tuple[str, int], int] = {}
    for actions in schedule.ranks:
        release = last_uses(actions)
        taken: Counter[tuple[str, int]] = Counter()
        for action in actions:
            link = action.kind, action.stage
            if action.kind in ("RECV_F", "RECV_B"):
                taken[link] += 1
                most[link] = max(most.get(link, 0), taken[link])
            elif action.key in release:
                taken["RECV_F", action.stage] -= 1
                taken["RECV_B", action.stage] -= 1
    return most


def slots_needed(schedule: Schedule) -> int:
    """The least ``slots`` that :func:`verify` accepts where transfers wait at their place in the order (one stream)."""
    return max(buffers(schedule).values(), default=1)


def _check_places(schedule: Schedule) -> None:
    num_ranks, m = len(schedule.ranks), schedule.num_microbatches
    if m < 1 or not schedule.rank_of or not all(0 <= rank < num_ranks for rank in schedule.rank_of):
        raise ScheduleError(f"rank_of is {schedule.rank_of} and num_microbatches {m}, for {num_ranks} rank(s)")
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            if action.kind not in KINDS:
                raise ScheduleError(f"rank {rank}: {action}: there is no such kind; one of {', '.join(KINDS)}")
            if not (0 <= action.stage < schedule.num_stages and 0 <= action.microbatch < m):
                raise ScheduleError(f"rank {rank}: {action}: there are {schedule.num_stages} stages, {m} micro-batches")
            if schedule.rank_of[action.stage] != rank:
                raise ScheduleError(f"rank {rank}: {action}: that stage is on rank {schedule.rank_of[action.stage]}")
            if action.group is not None and action.kind in COMPUTE:
                raise ScheduleError(f"rank {rank}: {action}: only transfers can be in a group")
        groups = Counter(step[0].group for step in steps(actions))
        torn = [group for group, count in groups.items() if group is not None and count > 1]
        if torn:
            first = next(action for action in actions if action.group == torn[0])
            raise ScheduleError(f"rank {rank}: {first}: the actions of a group do not stand side by side")


def _check_computations(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.ranks):
        count = Counter(action.key for action in actions if action.kind in COMPUTE)
        for stage in (s for s, owner in enumerate(schedule.rank_of) if owner == rank):
            for i in range(schedule.num_microbatches):
                found = {kind: count[kind, stage, i] for kind in COMPUTE}
                whole = {"F": 1, "B": 0, "W": 0, "BW": 1}
                if found not in (whole, {"F": 1, "B": 1, "W": 1, "BW": 0}):
                    what = ", ".join(f"{number} x {kind}" for kind, number in found.items() if number) or "nothing"
                    wrong = next((kind for kind in COMPUTE if found[kind] > 1), None)
                    wrong = wrong or ("F" if not found["F"] else "W" if found["B"] > found["W"] else "B")
                    raise ScheduleError(
                        f"rank {rank}: {Action(wrong, stage, i)}: found {what}; expected one F, and one BW or one B "
                        "and one W"
                    )


def _expected_transfers(schedule: Schedule, rank: int) -> Iterator[Key]:
    for stage in range(schedule.num_stages - 1):
        if schedule.crosses(stage):
            for kind, at in (("SEND_F", stage), ("RECV_F", stage + 1), ("SEND_B", stage + 1), ("RECV_B", stage)):
                if schedule.rank_of[at] == rank:
                    yield from ((kind, at, i) for i in range(schedule.num_microbatches))


def _check_transfers(schedule: Schedule, streams: int) -> None:
    orders: dict[tuple[int, int, str], list[Key]] = {}
    for rank, actions in enumerate(schedule.ranks):
        count = Counter(action.key for action in actions if action.kind in TRANSFERS)
        expected = set(_expected_transfers(schedule, rank))
        for key in sorted(expected | count.keys()):
            if count[key] != (key in expected):
                raise ScheduleError(
                    f"rank {rank}: {Action(*key)}: found {count[key]} times, expected {int(key in expected)}"
                )
        for action in actions:
            if action.kind in TRANSFERS:
                peer = schedule.rank_of[mate(action)[1]]
                is_send = action.kind.startswith("SEND")
                lane = action.kind[-1] if streams == 3 else ""
                src, dst = (rank, peer) if is_send else (peer, rank)
                orders.setdefault((src, dst, ("sends" if is_send else "receives") + lane), []).append(action.key)
    for (src, dst, what), sent in orders.items():
        if what.startswith("sends"):
            received = orders[src, dst, what.replace("sends", "receives")]
            for send, receive in zip(sent, received, strict=True):
                if mate(Action(*send)) != receive:
                    raise ScheduleError(
                        f"rank {src}: {Action(*send)} is crossed: rank {dst} is at {Action(*receive)} then, and "
                        "without tags each would take the other's data"
                    )


def _check_memory(schedule: Schedule) -> None:
    for rank, bound in enumerate(schedule.memory_bound or ()):
        for action, held in held_after(schedule.ranks[rank]):
            if held > bound:
                raise ScheduleError(f"rank {rank}: {action}: holds {held} stage-microbatches, promised are {bound}")


def _check_progress(schedule: Schedule, slots: int | None, streams: int) -> None:
    cycle = _Waits(schedule, slots, streams).cycle()
    if cycle:
        places = [f"rank {rank}: {action}" for rank, action in cycle]
        raise ScheduleError(f"{' waits for '.join([*places, places[0]])}: a cycle")


class _Waits:
    """Who waits for whom. Step n, counted over all ranks, has two nodes: it begins (2n), and it is done (2n + 1)."""

    def __init__(self, schedule: Schedule, slots: int | None, streams: int) -> None:
        self._schedule = schedule
        self._steps = [(rank, step) for rank, actions in enumerate(schedule.ranks) for step in steps(actions)]
        self._step_of = {action.key: n for n, (_, step) in enumerate(self._steps) for action in step}
        self._waits_for: list[list[int]] = [[] for _ in range(2 * len(self._steps))]
        self._add_order(streams)
        self._add_data()
        if slots is not None:
            self._add_buffers(slots)

    def _add_order(self, streams: int) -> None:
        last: dict[tuple[int, str], int] = {}
        for n, (rank, step) in enumerate(self._steps):
            self._waits_for[2 * n + 1].append(2 * n)
            for stream in {_stream(action, streams) for action in step}:
                if (rank, stream) in last:
                    self._waits_for[2 * n].append(2 * last[rank, stream] + 1)
                last[rank, stream] = n

    def _add_data(self) -> None:
        for n, (_, step) in enumerate(self._steps):
            for action in step:
                if action.kind in TRANSFERS:
                    # Done when the other end has begun as well.
                    self._waits_for[2 * n + 1].append(2 * self._step_of[mate(action)])
                for need in _inputs(action, self._schedule):
                    if need in self._step_of:
                        self._waits_for[2 * n].append(2 * self._step_of[need] + 1)

    def _add_buffers(self, slots: int) -> None:
        for actions in self._schedule.ranks:
            release = last_uses(actions)
            received: dict[tuple[str, int], list[Key]] = {}
            released: dict[int, list[Key]] = {}
            for action in actions:
                if action.kind in ("RECV_F", "RECV_B"):
                    received.setdefault((action.kind, action.stage), []).append(action.key)
                elif action.key in release:
                    released.setdefault(action.stage, []).append(action.key)
            for (_, stage), receives in received.items():
                for receive, freed in zip(receives[slots:], released[stage], strict=False):
                    self._waits_for[2 * self._step_of[receive]].append(2 * self._step_of[freed] + 1)

    def cycle(self) -> list[tuple[int, Action]]:
        """The (rank, action) of a cycle, each waiting for the next and the last for the first; empty if none."""
        waiting = [len(nodes) for nodes in self._waits_for]
        wakes: list[list[int]] = [[] for _ in self._waits_for]
        for node, nodes in enumerate(self._waits_for):
            for other in nodes:
                wakes[other].append(node)
        ready = [node for node, count in enumerate(waiting) if not count]
        while ready:
            for other in wakes[ready.pop()]:
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)
        stuck = next((node for node, count in enumerate(waiting) if count), None)
        if stuck is None:
            return []
        path: list[int] = []
        seen: dict[int, int] = {}
        while stuck not in seen:
            seen[stuck] = len(path)
            path.append(stuck)
            stuck = next(node for node in self._waits_for[stuck] if waiting[node])
        return self._shortened([node // 2 for node in path[seen[stuck] :]])

    def _shortened(self, cycle: list[int]) -> list[tuple[int, Action]]:
        """Of a stretch in which each step waits for an earlier one of its rank, the first and the last."""
        cycle = [n for at, n in enumerate(cycle) if n != cycle[at - 1] or len(cycle) == 1]

        def turns(at: int) -> bool:
            before, here = cycle[at - 1], cycle[at]
            return self._steps[before][0] != self._steps[here][0] or here > before

        ends = [at for at in range(len(cycle)) if turns(at) or turns((at + 1) % len(cycle))]
        first = next(at for at in ends if turns(at))
        ordered = [at for at in ends if at >= first] + [at for at in ends if at < first]
        return [(self._steps[cycle[at]][0], self._steps[cycle[at]][1][0]) for at in ordered]


def _stream(action: Action, streams: int) -> str:
    if streams == 1 or action.kind in COMPUTE:
        return "computation"
    return "transfers" if streams == 2 else action.kind[-1]


def _inputs(action: Action, schedule: Schedule) -> list[Key]:
    """What must be done on the same rank before ``action``; of alternatives, such as B and BW, both."""
    kind, stage, i = action.key
    if kind == "SEND_F":
        return [("F", stage, i)]
    if kind in ("SEND_B", "W"):
        return [("B", stage, i), ("BW", stage, i)]
    if kind == "F" and stage > 0:
        return [("RECV_F", stage, i) if schedule.crosses(stage - 1) else ("F", stage - 1, i)]
    if kind in ("B", "BW"):
        needs: list[Key] = [("F", stage, i)]
        if stage + 1 == schedule.num_stages:
            return needs
        if schedule.crosses(stage):
            return [*needs, ("RECV_B", stage, i)]
        return [*needs, ("B", stage + 1, i), ("BW", stage + 1, i)]
    return []
