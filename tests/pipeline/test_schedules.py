"""The known schedules: published bubbles, textbook formulas, promised memory, CSV."""

from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pycomm.errors import ScheduleError
from pycomm.pipeline import NAMES, Action, Costs, Schedule, build, lower, simulate, slots_needed, verify

DATA = Path(__file__).parent / "data" / "pipeline_bubbles.csv"


def rows() -> list[dict[str, str]]:
    with DATA.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['model']}-{row['microbatches']}")
def test_published_bubble_rates(row: dict[str, str]) -> None:
    costs = Costs(*(float(row[name]) for name in ("f_ms", "b_ms", "w_ms", "comm_ms")))
    timeline = simulate(build("1f1b", int(row["ranks"]), int(row["microbatches"])), costs)
    # Published to four digits from costs published to three decimals of a millisecond.
    assert abs(timeline.bubble_fraction - float(row["bubble_1f1b"])) <= 0.0005


def exact_bubble(schedule: Schedule) -> Fraction:
    """With F, B and W of one second each, all times are small whole numbers, so floats are exact until the division."""
    timeline = simulate(schedule, Costs(1, 1, 1))
    busy = sum(span.end - span.start for spans in timeline.ranks for span in spans)
    return 1 - Fraction(busy) / (len(timeline.ranks) * Fraction(timeline.makespan))


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("m", [1, 2, 3, 8, 13, 16])
def test_textbook_formulas_hold_exactly(p: int, m: int) -> None:
    for name in ("gpipe", "1f1b"):
        assert exact_bubble(build(name, p, m)) == Fraction(p - 1, m + p - 1)
    if m >= p:  # also where p does not divide m: the first rounds are larger then
        for v in (1, 2, 3):
            assert exact_bubble(build("interleaved_1f1b", p, m, v)) == Fraction(p - 1, v * m + p - 1)


@pytest.mark.parametrize(("p", "m"), [(8, 24), (4, 16), (8, 64)])
def test_zero_bubble_schedules_idle_less_with_the_memory_of_1f1b(p: int, m: int) -> None:
    timelines = {name: simulate(build(name, p, m)) for name in ("1f1b", "zb_h1", "zb_v")}
    bubble = {name: timeline.bubble_fraction for name, timeline in timelines.items()}
    peak = {name: max(timeline.peak_activations) for name, timeline in timelines.items()}
    assert bubble["zb_h1"] <= 0.4 * bubble["1f1b"]
    assert bubble["zb_v"] < 0.6 * bubble["zb_h1"]
    assert peak["zb_h1"] == peak["1f1b"]
    assert peak["zb_v"] == 2 * peak["1f1b"]  # its stages are half as large
    # The paper's makespan of ZB-H1 with equal costs; ZB-V idles only until the first micro-batch reaches the last rank.
    assert timelines["zb_h1"].makespan == 3 * m + p - 1
    assert timelines["zb_v"].makespan == 6 * m + p - 1


@pytest.mark.parametrize(
    ("memory", "bound"), [((1, 1), [2, 2]), ((1, 1.04), [2, 2]), ((1, 1.3), [2, 1]), ((3, 1), [2, 2])]
)
def test_zb_h1_of_unequal_stages_keeps_to_the_memory_of_1f1b(memory: tuple[float, float], bound: list[int]) -> None:
    schedule = build("zb_h1", 2, 8, stage_memory=memory)
    verify(schedule)
    assert schedule.memory_bound == bound
    weighed = {
        name: max(peak * size for peak, size in zip(simulate(order).peak_activations, memory, strict=True))
        for name, order in (("1f1b", build("1f1b", 2, 8)), ("zb_h1", schedule))
    }
    assert weighed["zb_h1"] <= 1.05 * weighed["1f1b"]
    # Even where every W follows its B at once, the gradient has left before it.
    assert simulate(schedule).makespan < simulate(build("1f1b", 2, 8)).makespan


@settings(max_examples=30, deadline=None)
@given(memory=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), m=st.integers(1, 12))
def test_zb_h1_is_sound_for_any_memory_of_stages(memory: list[float], m: int) -> None:
    verify(build("zb_h1", len(memory), m, stage_memory=memory))


def test_memory_of_stages_fits_the_schedule() -> None:
    for memory in ([1.0], [1.0, 0.0], []):
        with pytest.raises(ValueError, match="a positive number for each of 2 stages"):
            build("zb_h1", 2, 4, stage_memory=memory)
    with pytest.raises(ValueError, match="stage_memory is for zb_h1: gpipe"):
        build("gpipe", 2, 4, stage_memory=[1.0, 1.0])


def test_no_schedule_holds_more_than_it_promises_and_some_rank_holds_that() -> None:
    for name in NAMES:
        schedule = build(name, 4, 8, 2 if name == "interleaved_1f1b" else 1)
        peaks = simulate(schedule).peak_activations
        assert schedule.memory_bound is not None
        assert all(peak <= bound for peak, bound in zip(peaks, schedule.memory_bound, strict=True))
        assert max(peaks) == max(schedule.memory_bound)


def test_buffers_do_not_grow_with_the_batch_unless_all_is_held_anyway() -> None:
    for name in ("1f1b", "interleaved_1f1b", "zb_h1", "zb_v"):
        assert slots_needed(build(name, 4, 32)) == slots_needed(build(name, 4, 16)) <= 8
    assert slots_needed(build("gpipe", 4, 16)) == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("2f2b", 2, 4), "no schedule '2f2b'"),
        (("1f1b", 0, 4), "num_ranks is 0"),
        (("1f1b", 2, 0), "num_microbatches is 0"),
        (("gpipe", 2, 4, 2), "chunks_per_rank=2"),
        (("zb_v", 2, 4, 3), "chunks_per_rank=3"),
        (("interleaved_1f1b", 2, 4, 0), "chunks_per_rank=0"),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(*arguments)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), p=st.integers(1, 5), m=st.integers(1, 9))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, name: str, p: int, m: int) -> None:
    path = tmp_path_factory.getbasetemp() / "schedule.csv"
    schedule = build(name, p, m)
    schedule.to_csv(path)
    again = Schedule.from_csv(path)
    assert (again.ranks, again.rank_of, again.num_microbatches) == (schedule.ranks, schedule.rank_of, m)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("rank,index,kind,stage,microbatch\n0,0,F,0,0\n", "group"),
        ("rank,index,kind,stage,microbatch,group\n0,0,X,0,0,\n", "line 2.*'X'"),
        ("rank,index,kind,stage,microbatch,group\n0,0,F,0,0,\n0,0,F,0,1,\n", "line 3.*number 0"),
        ("rank,index,kind,stage,microbatch,group\n0,0,F,0,zero,\n", "line 2.*zero"),
        ("rank,index,kind,stage,microbatch,group\n0,0,F,0,0,\n1,0,F,0,1,\n", "line 3.*stage 0 is on rank 0"),
        ("rank,index,kind,stage,microbatch,group\n0,0,F,1,0,\n", "without gaps"),
        ("rank,index,kind,stage,microbatch,group\n0,0,F,-1,0,\n", "negative"),
        ("rank,index,kind,stage,microbatch,group\n0,0,F,0\n", "line 2"),
        ("rank,index,kind,stage,microbatch,group\n", "without gaps"),
    ],
)
def test_csv_that_makes_no_sense(tmp_path: Path, lines: str, said: str) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(lines)
    with pytest.raises(ScheduleError, match=said):
        Schedule.from_csv(path)


def test_a_schedule_of_ones_own() -> None:
    """One micro-batch after the other: as simple and as slow as can be."""
    order = [
        [action for i in range(3) for action in (Action("F", stage, i), Action("BW", stage, i))] for stage in range(3)
    ]
    schedule = lower(Schedule(order, [0, 1, 2], 3))
    verify(schedule, slots=1)
    assert simulate(schedule).makespan == 27
    with pytest.raises(ScheduleError, match="already"):
        lower(schedule)
    order[0].reverse()
    with pytest.raises(ScheduleError, match="rank 0 at BW of stage 0, micro-batch 2"):
        lower(Schedule(order, [0, 1, 2], 3))
