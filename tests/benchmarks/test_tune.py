"""What PYCOMM_TUNE could be set to: the values tried, what counts as better, and a run on ranks of its own."""

import json

import psutil
import pytest
import tune
from harness import Samples
from tune import AGAIN, IN_USE, Ratio


def test_alternatives_are_possible_values():
    in_use = {"slice_bytes": 32768, "one_shot_bytes": 16384, "eager_bytes": 128, "stream_bytes": 262144}
    assert tune.alternatives("slice_bytes", in_use, 4) == [65536, 131072]
    assert tune.alternatives("one_shot_bytes", in_use, 4) == [4096, 8192]
    assert tune.alternatives("eager_bytes", in_use, 4) == [64, 256, 512]
    assert tune.alternatives("stream_bytes", in_use, 4) == [65536, 131072, 524288, 1048576]


def test_ratios_are_taken_turn_by_turn():
    def samples(*medians):
        return Samples([time for median in medians for time in (median / 2, median, 9 * median)], iterations=3)

    assert tune.ratio(samples(2.0, 40.0, 6.0), samples(1.0, 20.0, 3.0)) == Ratio(2.0, 2.0, 2.0)
    assert tune.ratio(samples(*range(11)), samples(*[10.0] * 11)) == Ratio(0.5, 0.1, 0.9)


QUIET, NOISY = Ratio(1.0, 0.98, 1.02), Ratio(1.0, 0.7, 1.4)


@pytest.mark.parametrize(
    ("itself", "ratios", "better"),
    [
        (QUIET, [[Ratio(0.97, 0.96, 0.98)]], None),  # too little
        (QUIET, [[Ratio(0.8, 0.5, 1.1)]], None),  # not in nine of ten turns
        (QUIET, [[Ratio(0.8, 0.7, 0.9)]], "x=1"),
        (NOISY, [[Ratio(0.8, 0.7, 0.9)]], None),  # what is in use differs as much from itself
        (QUIET, [[Ratio(0.8, 0.7, 0.9)], [Ratio(1.2, 1.1, 1.3)]], None),  # slower elsewhere
        (QUIET, [[Ratio(0.8, 0.7, 0.9)], [Ratio(1.1, 0.9, 1.3)]], "x=1"),  # perhaps
        (QUIET, [[Ratio(0.8, 0.7, 0.9), Ratio(0.6, 0.5, 0.7)]], "x=2"),  # the better one
        (QUIET, [[Ratio(0.8, 0.7, 0.9)], []], None),  # it failed elsewhere
    ],
)
def test_only_what_is_clearly_better_is_said_to_be(itself, ratios, better):
    names = ["x=1", "x=2"]
    assert (
        tune.better_value([{**dict(zip(names, row, strict=False)), AGAIN: itself} for row in ratios], names) == better
    )


def test_it_measures_on_ranks_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "5")  # as inside someone's launcher
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("PYCOMM_TUNE", "eager_bytes=8K")
    before = psutil.Process().children()
    file = tmp_path / "ratios.jsonl"
    flags = ["--thresholds", "eager_bytes", "--turns", "2", "--iters", "2", "--json", str(file)]
    assert tune.main(["--ranks", "3", *flags]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["bytes"] for line in lines] == [4096, 8192, 16384, 32768]
    values = [f"eager_bytes={value}" for value in (2048, 4096, 16384, 32768)]
    for line in lines:
        assert list(line["ratios"]) == [IN_USE, *values, AGAIN]
        assert all(0 < found["low"] <= found["median"] <= found["high"] for found in line["ratios"].values())
    assert psutil.Process().children() == before
    assert "8192 in use" in capsys.readouterr().out


def test_the_end_says_what_to_set(monkeypatch, capsys):
    monkeypatch.setenv("PYCOMM_TUNE", "slice_bytes=64K")
    monkeypatch.setattr(tune, "measure", lambda *_: (16384, []))
    assert tune.main(["--thresholds", "eager_bytes"]) == 0
    assert "set PYCOMM_TUNE=slice_bytes=65536,eager_bytes=16384 for all ranks" in capsys.readouterr().out
    monkeypatch.setattr(tune, "measure", lambda *_: (None, []))
    assert tune.main(["--thresholds", "eager_bytes"]) == 0
    assert "Nothing is clearly better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "tuned", "said"),
    [
        (["--ranks", "1"], "", "--ranks must be from 2"),
        (["--thresholds", "slices"], "", "--thresholds: there are "),
        ([], "slices=1", "there is no threshold 'slices'"),
    ],
)
def test_what_cannot_be_measured_is_said(monkeypatch, capsys, flags, tuned, said):
    monkeypatch.setenv("PYCOMM_TUNE", tuned)
    with pytest.raises(SystemExit):
        tune.main(flags)
    assert said in capsys.readouterr().err


def test_a_rank_that_fails_is_named(monkeypatch, capsys):
    monkeypatch.setattr(tune, "tunings", lambda *_: {IN_USE: "", "x=1": "x=1", AGAIN: ","})
    assert tune.main(["--thresholds", "eager_bytes", "--turns", "1", "--iters", "1"]) == 1
    said = capsys.readouterr().out
    assert "x=1 lost rank" in said
    assert "there is no threshold 'x'" in said
    assert "Nothing is clearly better" in said
