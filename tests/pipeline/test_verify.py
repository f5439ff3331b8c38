"""verify() accepts what build() makes, and names rank and action of every kind of mistake."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest

from pycomm.errors import ScheduleError
from pycomm.pipeline import NAMES, Action, Schedule, build, slots_needed, verify
from pycomm.pipeline.actions import TRANSFERS


@pytest.mark.parametrize("name", NAMES)
def test_every_generated_schedule_is_accepted(name: str) -> None:
    for p in range(1, 9):
        for m in range(1, 17):
            verify(build(name, p, m))


@pytest.mark.parametrize("name", NAMES)
def test_with_as_few_buffers_as_possible_and_on_any_number_of_streams(name: str) -> None:
    for p in range(1, 5):
        for m in (1, 2, 3, 5, 8):
            for chunks in (2, 3) if name == "interleaved_1f1b" else (1,):
                schedule = build(name, p, m, chunks)
                slots = slots_needed(schedule)
                for streams in (1, 2, 3):
                    verify(schedule, slots=slots, streams=streams)
                if slots > 1:
                    with pytest.raises(ScheduleError, match="RECV_[FB] of stage"):
                        verify(schedule, slots=slots - 1)


# Mutations: each changes a sound schedule and returns what the message must name, or None where there is nothing of the
# kind to change.
Named = tuple[int, str]
Random = random.Random


def places(schedule: Schedule, *kinds: str) -> list[tuple[int, int]]:
    return [
        (rank, index)
        for rank, actions in enumerate(schedule.ranks)
        for index, action in enumerate(actions)
        if action.kind in kinds
    ]


def pick(schedule: Schedule, rng: Random, *kinds: str) -> tuple[int, int, Action] | None:
    found = places(schedule, *kinds)
    if not found:
        return None
    rank, index = rng.choice(found)
    return rank, index, schedule.ranks[rank][index]


def drop(*kinds: str) -> Callable[[Schedule, Random], Named | None]:
    def mutate(schedule: Schedule, rng: Random) -> Named | None:
        chosen = pick(schedule, rng, *kinds)
        if chosen is None:
            return None
        rank, index, action = chosen
        del schedule.ranks[rank][index]
        kind = {"BW": "B"}.get(action.kind, action.kind)
        return rank, str(Action(kind, action.stage, action.microbatch))

    return mutate


def twice(*kinds: str) -> Callable[[Schedule, Random], Named | None]:
    def mutate(schedule: Schedule, rng: Random) -> Named | None:
        chosen = pick(schedule, rng, *kinds)
        if chosen is None:
            return None
        rank, index, action = chosen
        schedule.ranks[rank].insert(index, action)
        return rank, str(action._replace(group=None))

    return mutate


def move_before(later: str, earlier: str, same_microbatch: bool = True) -> Callable[[Schedule, Random], Named | None]:
    """Put an action of kind ``later`` right before the one of kind ``earlier`` that it needs, out of any group."""

    def mutate(schedule: Schedule, rng: Random) -> Named | None:
        pairs = [
            (rank, first, second)
            for rank, actions in enumerate(schedule.ranks)
            for first, a in enumerate(actions)
            for second, b in enumerate(actions)
            if a.kind == earlier and b.kind == later and a.stage == b.stage and a.microbatch == b.microbatch
        ]
        if not pairs:
            return None
        rank, first, second = rng.choice(pairs)
        action = schedule.ranks[rank].pop(second)
        while first and schedule.ranks[rank][first].group is not None:
            first -= 1  # not into the middle of a group
        schedule.ranks[rank].insert(first, action._replace(group=None))
        return rank, str(schedule.ranks[rank][first])

    return mutate


def replace(change: Callable[[Schedule, Action], Action]) -> Callable[[Schedule, Random], Named | None]:
    def mutate(schedule: Schedule, rng: Random) -> Named | None:
        rank, index, action = pick(schedule, rng, "F", "B", "BW", "W")  # type: ignore[misc]
        schedule.ranks[rank][index] = changed = change(schedule, action)
        return rank, str(changed)

    return mutate


def to_another_rank(schedule: Schedule, rng: Random) -> Named | None:
    if len(schedule.ranks) == 1:
        return None
    rank, index, action = pick(schedule, rng, "F", "BW", "B", "W")  # type: ignore[misc]
    del schedule.ranks[rank][index]
    other = (rank + 1) % len(schedule.ranks)
    schedule.ranks[other].append(action)
    return other, str(action)


def cross_two_sends(schedule: Schedule, rng: Random) -> Named | None:
    """Two sends of a stage change places, so that their receiver takes one for the other."""
    found = [
        (rank, [index for index, action in enumerate(actions) if action.kind == kind and action.stage == stage])
        for rank, actions in enumerate(schedule.ranks)
        for kind in ("SEND_F", "SEND_B")
        for stage in range(schedule.num_stages)
    ]
    found = [(rank, indices) for rank, indices in found if len(indices) >= 2]
    if not found:
        return None
    rank, indices = rng.choice(found)
    actions = schedule.ranks[rank]
    a, b = indices[-2:]
    # The later one's data would not be there at the earlier one's place, so both go to the later.
    first = actions[a]._replace(group=actions[b].group)
    actions[b : b + 1] = [actions[b], first]
    del actions[a]
    return rank, "is crossed"


def tear_a_group(schedule: Schedule, rng: Random) -> Named | None:
    for rank, actions in enumerate(schedule.ranks):
        for index in range(1, len(actions)):
            if actions[index].group is not None and actions[index].group == actions[index - 1].group:
                computation = next((n for n in range(index, len(actions)) if actions[n].kind not in TRANSFERS), None)
                if computation is not None:
                    group = actions[index].group
                    actions.insert(computation + 1, actions.pop(index))
                    return rank, f"(group {group})"
    return None


def unpromised_memory(schedule: Schedule, rng: Random) -> Named | None:
    assert schedule.memory_bound is not None
    rank = rng.randrange(len(schedule.ranks))
    schedule.memory_bound[rank] = 0
    first = next(action for action in schedule.ranks[rank] if action.kind == "F")
    return rank, str(first)


def needless_transfer(schedule: Schedule, rng: Random) -> Named | None:
    last = schedule.rank_of[-1]
    action = Action("RECV_B", schedule.num_stages - 1, 0)
    schedule.ranks[last].append(action)
    return last, str(action)


MUTATIONS = {
    "missing F": drop("F"),
    "missing W": drop("W"),
    "missing backward": drop("B", "BW"),
    "dropped receive": drop("RECV_F", "RECV_B"),
    "dropped send": drop("SEND_F", "SEND_B"),
    "F twice": twice("F"),
    "W twice": twice("W"),
    "receive twice": twice("RECV_F", "RECV_B"),
    "backward before forward": move_before("BW", "F"),
    "B before F": move_before("B", "F"),
    "W before B": move_before("W", "B"),
    "F before its input is here": move_before("F", "RECV_F"),
    "backward before its gradient is here": move_before("BW", "RECV_B"),
    "send before F": move_before("SEND_F", "F"),
    "send before backward": move_before("SEND_B", "BW"),
    "receive of the gradient before the forward is sent": move_before("RECV_B", "F"),
    "crossed sends": cross_two_sends,
    "torn group": tear_a_group,
    "computation in a group": replace(lambda schedule, action: action._replace(group=99)),
    "unknown kind": replace(lambda schedule, action: action._replace(kind="X")),
    "unknown stage": replace(lambda schedule, action: action._replace(stage=schedule.num_stages)),
    "unknown micro-batch": replace(lambda schedule, action: action._replace(microbatch=schedule.num_microbatches)),
    "on another rank": to_another_rank,
    "more memory than promised": unpromised_memory,
    "needless transfer": needless_transfer,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_rejected_by_rank_and_action(mutation: str) -> None:
    rng = Random(mutation)
    num_rejected = 0
    for name in NAMES:
        for p, m in ((2, 4), (3, 5), (4, 8)):
            sound = build(name, p, m, 2 if name == "interleaved_1f1b" else 1)
            for _ in range(4):
                schedule = copy.deepcopy(sound)
                named = MUTATIONS[mutation](schedule, rng)
                if named is None:
                    continue
                with pytest.raises(ScheduleError) as caught:
                    verify(schedule)
                assert f"rank {named[0]}" in str(caught.value)
                assert named[1] in str(caught.value)
                num_rejected += 1
    assert num_rejected >= 12


def test_a_receive_before_its_buffer_is_free() -> None:
    schedule = build("1f1b", 2, 4)
    verify(schedule, slots=2)
    receive = Action("RECV_F", 1, 1)
    at = [action.key for action in schedule.ranks[1]].index(receive.key)
    released = [action.key for action in schedule.ranks[1]].index(("BW", 1, 0))
    assert at < released  # it is received while the first micro-batch still has its buffer
    with pytest.raises(ScheduleError, match="rank 1: RECV_F of stage 1, micro-batch 1"):
        verify(schedule, slots=1)


def test_two_ranks_that_send_before_they_receive() -> None:
    """Sound with a stream for each direction, or in one group; a deadlock on one stream. The cycle names all four."""

    def exchange(group: int | None) -> Schedule:
        ranks = [
            [("F", 0, 0), ("SEND_F", 0, 0), ("F", 0, 1), ("SEND_F", 0, 1), ("RECV_B", 0, 0), ("BW", 0, 0)],
            [("RECV_F", 1, 0), ("F", 1, 0), ("BW", 1, 0), ("SEND_B", 1, 0), ("RECV_F", 1, 1), ("F", 1, 1)],
        ]
        ranks[0] += [("RECV_B", 0, 1), ("BW", 0, 1)]
        ranks[1] += [("BW", 1, 1), ("SEND_B", 1, 1)]
        grouped = {("SEND_F", 0, 1), ("RECV_B", 0, 0), ("SEND_B", 1, 0), ("RECV_F", 1, 1)}
        return Schedule(
            [[Action(*key, group if key in grouped else None) for key in keys] for keys in ranks], [0, 1], 2
        )

    verify(exchange(7), streams=1)
    verify(exchange(None), streams=3)
    with pytest.raises(ScheduleError) as caught:
        verify(exchange(None), streams=1)
    message = str(caught.value)
    for place in (
        "rank 0: SEND_F of stage 0, micro-batch 1 waits for rank 1: RECV_F of stage 1, micro-batch 1",
        "rank 1: SEND_B of stage 1, micro-batch 0 waits for rank 0: RECV_B of stage 0, micro-batch 0",
    ):
        assert place in message


@pytest.mark.parametrize(("options", "said"), [({"slots": 0}, "slots is 0"), ({"streams": 4}, "streams is 4")])
def test_wrong_arguments(options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        verify(build("1f1b", 2, 2), **options)
    with pytest.raises(ScheduleError, match="rank_of"):
        verify(Schedule([[]], [1], 1))
