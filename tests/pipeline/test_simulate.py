"""The simulator against timelines that can be worked out by hand, and what draws them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

from pycomm import cli
from pycomm.errors import ScheduleError
from pycomm.pipeline import Action, Costs, Schedule, Timeline, build, draw, simulate, transfer_s

TWO = build("1f1b", 2, 2)


def times(timeline: Timeline, rank: int) -> list[tuple[str, int, float, float]]:
    return [(s.action.kind, s.action.microbatch, s.start, s.end) for s in timeline.ranks[rank]]


def test_costs_of_each_stage_and_of_transfers() -> None:
    timeline = simulate(TWO, Costs(f=[1.0, 2.0], b=[3.0, 4.0], w=[0.5, 1.0], comm=10.0))
    # Stage 1 gets micro-batch 0 at 1 + 10, needs 2 + 5; stage 0 has the gradient at 18 + 10, and goes on without it.
    assert times(timeline, 0) == [("F", 0, 0, 1), ("F", 1, 1, 2), ("BW", 0, 28, 31.5), ("BW", 1, 35, 38.5)]
    assert times(timeline, 1) == [("F", 0, 11, 13), ("BW", 0, 13, 18), ("F", 1, 18, 20), ("BW", 1, 20, 25)]
    assert timeline.makespan == 38.5
    assert timeline.bubble_fraction == 1 - (2 * 1 + 2 * 3.5 + 2 * 2 + 2 * 5) / (2 * 38.5)
    assert timeline.peak_activations == [2, 1]


def test_transfers_that_keep_both_ends_busy() -> None:
    timeline = simulate(TWO, Costs(f=[1.0, 2.0], comm=[0.5], overlap=False))
    sends = [(s.action.kind, s.action.microbatch, s.start, s.end) for s in timeline.ranks[0] if "_" in s.action.kind]
    # The second send waits, its rank with it, until the receiver is done with the first micro-batch's F.
    assert sends[:2] == [("SEND_F", 0, 1, 1.5), ("SEND_F", 1, 2.5, 4.0)]
    assert simulate(TWO, Costs(f=[1.0, 2.0], comm=0.5)).makespan < timeline.makespan


def test_a_group_ends_with_its_last_transfer() -> None:
    ranks = [
        [Action("F", 0, 0), Action("F", 0, 1), Action("SEND_F", 0, 0, 0), Action("SEND_F", 0, 1, 0)],
        [Action("RECV_F", 1, 0, 3), Action("RECV_F", 1, 1, 3), Action("F", 1, 0), Action("F", 1, 1)],
    ]
    timeline = simulate(Schedule(ranks, [0, 1], 2), Costs(comm=0.25, overlap=False))
    assert {span.end for span in timeline.ranks[0][2:]} == {2.25}
    assert times(timeline, 1)[2:] == [("F", 0, 2.25, 3.25), ("F", 1, 3.25, 4.25)]


def test_critical_path_has_no_slack() -> None:
    for schedule in (TWO, build("zb_v", 3, 5), build("interleaved_1f1b", 4, 6, 2)):
        for overlap in (True, False):
            timeline = simulate(schedule, Costs(1.0, 1.5, 0.5, 0.25, overlap=overlap))
            spans = {(rank, span.action): span for rank, spans in enumerate(timeline.ranks) for span in spans}
            chain = [spans[place] for place in timeline.critical_path()]
            assert chain[0].start == 0
            assert chain[-1].end == timeline.makespan
            for before, after in pairwise(chain):
                gap = after.start - before.end
                assert gap in (0, 0.25) or (not overlap and "_" in after.action.kind)


def test_a_rank_that_waits_for_ever_is_named() -> None:
    schedule = build("1f1b", 2, 1)
    schedule.ranks[0].remove(Action("F", 0, 0))
    with pytest.raises(ScheduleError, match="rank 0 at BW of stage 0, micro-batch 0; rank 1 at F of stage 1"):
        simulate(schedule)


def test_nothing_to_do() -> None:
    timeline = simulate(Schedule([[]], [], 0))
    assert (timeline.makespan, timeline.bubble_fraction, timeline.peak_activations) == (0, 0, [0])
    assert timeline.critical_path() == []


def test_seconds_of_a_message() -> None:
    assert transfer_s(1e6, bytes_per_s=1e9, latency_s=2e-6) == pytest.approx(1.002e-3, rel=1e-12)


def test_text_is_one_character_a_second() -> None:
    assert draw.text(simulate(TWO)).splitlines() == ["rank 0  |FF..BB.BB|", "rank 1  |.FBBFBB..|"]
    assert all(len(line) == 50 for line in draw.text(simulate(TWO, Costs(f=1.3)), width=40).splitlines())


def test_svg_has_a_bar_for_every_computation_of_every_timeline(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    planned, measured = simulate(build("zb_h1", 3, 4)), simulate(build("zb_h1", 3, 4), Costs(f=2.0))
    draw.svg({"planned <costs>": planned, "measured": measured}, path)
    root = ET.fromstring(path.read_text())
    titles = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * 3 * 4 * 3
    assert sum(title.startswith("W of stage 2, micro-batch 3: ") for title in titles) == 2
    ends = {}
    for bar, title in zip(root.iter("{http://www.w3.org/2000/svg}g"), titles, strict=True):
        rect = bar.find("{http://www.w3.org/2000/svg}rect")
        assert rect is not None
        end = float(rect.get("x", "")) + float(rect.get("width", ""))
        ends[float(title.split(" to ")[1].split()[0])] = end
    # One axis for both: the same second lies at the same pixel.
    (start, *_, last) = sorted(ends)
    scale = (ends[last] - ends[start]) / (last - start)
    assert all(abs(ends[start] + (second - start) * scale - x) < 0.1 for second, x in ends.items())


def test_command_draws_saves_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, table = tmp_path / "out.svg", tmp_path / "out.csv"
    arguments = ["schedule", "1f1b", "--ranks", "4", "--microbatches", "8", "--svg", str(svg), "--csv", str(table)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "rank 3  |...FBB" in out
    assert "makespan 33 s, bubble 0.2727" in out
    assert ET.fromstring(svg.read_text()).tag.endswith("svg")
    assert Schedule.from_csv(table).ranks == build("1f1b", 4, 8).ranks
    assert cli.main(["schedule", str(table), "--f", "2"]) == 0
    assert "bubble 0.2727" in capsys.readouterr().out
    table.write_text("".join(line for line in table.open() if ",RECV_F,2,3," not in line))
    assert cli.main(["schedule", str(table)]) == 1
    assert "RECV_F of stage 2, micro-batch 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["1f1b", "--ranks", "4"], "--microbatches"),
        (["2f2b", "--ranks", "4", "--microbatches", "4"], "2f2b"),
        (["gpipe", "--ranks", "0", "--microbatches", "4"], "--ranks: it must be at least 1, got 0"),
        (["missing.csv"], "missing.csv"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = cli.main(["schedule", *arguments])
    except SystemExit as ended:  # argparse leaves so
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err
