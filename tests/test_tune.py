"""PYCOMM_TUNE sets the thresholds of all ranks, and `pycomm doctor --tune` measures what they could be set to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

import pycomm
from pycomm import Communicator, doctor, env
from pycomm.backends.shm import tuning_here
from pycomm.doctor import tune
from pycomm.doctor.tune import Measured, Ratio, Threshold, TuneError, Workload
from tests.host.test_random_calls import run_program
from tests.pool import TIMEOUT_S, Pool, file_store


@pytest.mark.parametrize(
    ("text", "thresholds"),
    [
        ("", {}),
        (" , ", {}),
        ("slice_bytes=131072", {"slice_bytes": 131072}),
        (
            "slice_bytes=1M, eager_bytes = 16K ,one_shot_bytes=0",
            {"slice_bytes": 1 << 20, "eager_bytes": 16384, "one_shot_bytes": 0},
        ),
    ],
)
def test_tune_is_read(monkeypatch: pytest.MonkeyPatch, text: str, thresholds: dict[str, int]) -> None:
    monkeypatch.setenv("PYCOMM_TUNE", text)
    assert env.tune() == thresholds
    found = tuning_here(2)
    assert found.items() >= thresholds.items()
    assert found.keys() == {"slice_bytes", "one_shot_bytes", "cached_bytes", "eager_bytes", "stream_bytes"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slice_bytes", "'slice_bytes' does not read like slice_bytes=131072"),
        ("slice_bytes=-1", "'slice_bytes=-1' does not read like"),
        ("slice_bytes=1.5K", "does not read like"),
        ("eager_bytes=1K,eager_bytes=2K", "names eager_bytes twice"),
        (
            "slices=1",
            "there is no threshold 'slices'; it is one of slice_bytes, one_shot_bytes, cached_bytes, ",
        ),
        ("slice_bytes=1K", "PYCOMM_TUNE: slice_bytes=1024: it is from 32768 to 16777216 and a multiple of 64"),
        ("eager_bytes=100", "eager_bytes=100: it is from 0 to 1048576 and a multiple of 64"),
        ("one_shot_bytes=17000", "one_shot_bytes=17000: it is from 0 to 16384$"),
        ("stream_bytes=99999999999999999999999", "stream_bytes"),
    ],
)
def test_nonsense_is_an_error_that_says_what_would_do(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv("PYCOMM_TUNE", text)
    with pytest.raises(ValueError, match=message):
        pycomm.init()


def run_tuned(comm: Communicator, path: str, text: str, strict: bool) -> dict[str, int]:
    """Rank 0's thresholds count, whatever the others' say; groups that are split from the world have them, too."""
    os.environ["PYCOMM_TUNE"] = text if comm.rank == 0 else "slice_bytes=64K"
    try:
        tuned = pycomm.init(
            store=file_store(path, comm.world_size),
            rank=comm.rank,
            world_size=comm.world_size,
            timeout_s=TIMEOUT_S,
            strict=strict,
        )
    finally:
        del os.environ["PYCOMM_TUNE"]
    with tuned:
        run_program(tuned, list(range(70)))
        tuned.barrier()
        part = tuned.split(0)
        assert part is not None
        found: dict[str, int] = part._backend._core.tuning()  # type: ignore[attr-defined]
        part.close()
    return found


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "thresholds",
    [
        {"slice_bytes": 32768, "one_shot_bytes": 0, "cached_bytes": 0, "eager_bytes": 0, "stream_bytes": 4096},
        {"slice_bytes": 32768, "one_shot_bytes": 16384, "cached_bytes": 9999, "eager_bytes": 64, "stream_bytes": 4160},
        {
            "slice_bytes": 1 << 20,
            "one_shot_bytes": 16384,
            "cached_bytes": 1 << 30,
            "eager_bytes": 1 << 20,
            "stream_bytes": 1 << 24,
        },
    ],
)
def test_every_threshold_gives_the_same_bits(
    pool: Pool, tmp_path: Path, thresholds: dict[str, int], strict: bool
) -> None:
    text = ",".join(f"{name}={value}" for name, value in thresholds.items())
    assert pool.run(3, run_tuned, str(tmp_path / "store"), text, strict) == [thresholds] * 3


def test_alternatives_are_possible_values() -> None:
    in_use = {"slice_bytes": 32768, "one_shot_bytes": 16384, "eager_bytes": 128, "stream_bytes": 262144}
    assert tune.alternatives("slice_bytes", in_use, 4) == [65536, 131072]
    assert tune.alternatives("one_shot_bytes", in_use, 4) == [4096, 8192]
    assert tune.alternatives("eager_bytes", in_use, 4) == [64, 256, 512]
    assert tune.alternatives("stream_bytes", in_use, 4) == [65536, 131072, 524288, 1048576]


def test_ratios_are_taken_round_by_round() -> None:
    assert tune.ratio([2.0, 40.0, 6.0], [1.0, 20.0, 3.0]) == Ratio(2.0, 2.0, 2.0)
    assert tune.ratio([float(n) for n in range(11)], [10.0] * 11) == Ratio(0.5, 0.1, 0.9)


QUIET, NOISY = Ratio(1.0, 0.98, 1.02), Ratio(1.0, 0.7, 1.4)


@pytest.mark.parametrize(
    ("itself", "ratios", "better"),
    [
        (QUIET, [[Ratio(0.97, 0.96, 0.98)]], None),  # too little
        (QUIET, [[Ratio(0.8, 0.5, 1.1)]], None),  # not in nine of ten rounds
        (QUIET, [[Ratio(0.8, 0.7, 0.9)]], 64),
        (NOISY, [[Ratio(0.8, 0.7, 0.9)]], None),  # what is in use differs as much from itself
        (QUIET, [[Ratio(0.8, 0.7, 0.9)], [Ratio(1.2, 1.1, 1.3)]], None),  # slower elsewhere
        (QUIET, [[Ratio(0.8, 0.7, 0.9)], [Ratio(1.1, 0.9, 1.3)]], 64),  # perhaps
        (QUIET, [[Ratio(0.8, 0.7, 0.9), Ratio(0.6, 0.5, 0.7)]], 128),  # the better one
    ],
)
def test_only_what_is_clearly_better_is_said_to_be(
    itself: Ratio, ratios: list[list[Ratio]], better: int | None
) -> None:
    workload = Workload("send", "ordinary", 64)
    measured = [Measured(workload, 1e-6, itself, row) for row in ratios]
    assert tune.better_value([64, 128][: len(ratios[0])], measured) == better


def test_it_measures_on_ranks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")  # as inside someone's launcher
    monkeypatch.setenv("WORLD_SIZE", "8")
    before = psutil.Process().children()
    seen: list[tuple[int, int]] = []
    (threshold,) = tune.tune(
        3, 120.0, num_rounds=2, names=["eager_bytes"], progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(number, 4) for number in range(1, 5)]
    assert threshold.values[0] == tuning_here(3)["eager_bytes"]
    assert len(threshold.measured) == 4
    for one in threshold.measured:
        assert len(one.ratios) == len(threshold.values) - 1
        assert one.time_s > 0
        for ratio in (one.itself, *one.ratios):
            assert 0 < ratio.low <= ratio.median <= ratio.high
    assert psutil.Process().children() == before


def test_a_rank_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank_dies.py").write_text("raise SystemExit('out of luck')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TuneError, match="rank 0: out of luck"):
        tune.tune(2, 60.0, worker="rank_dies")


INVENTED = [
    Threshold(
        "eager_bytes",
        [8192, 16384],
        [Measured(Workload("send", "ordinary", 16384), 2e-5, QUIET, [Ratio(0.8, 0.75, 0.85)])],
        16384,
    )
]


def test_the_table_says_what_to_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("PYCOMM_TUNE", "slice_bytes=64K")
    monkeypatch.setattr(tune, "tune", lambda *_, **__: INVENTED)
    assert doctor.main(["--tune"]) == 0
    text = capsys.readouterr().out
    assert "8 KiB (in use)" in text
    assert "0.80 (0.75 … 0.85)" in text
    assert "set PYCOMM_TUNE=slice_bytes=65536,eager_bytes=16384 for all ranks" in text
    assert doctor.main(["--tune", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["set"] == "slice_bytes=65536,eager_bytes=16384"
    assert found["thresholds"][0]["measured"][0]["ratios"][0]["median"] == 0.8
    monkeypatch.setattr(tune, "tune", lambda *_, **__: [Threshold("eager_bytes", [8192])])
    assert doctor.main(["--tune"]) == 0
    assert "Nothing is clearly better" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "tuned", "status"), [(["--ranks", "1"], "", 2), ([], "slices=1", 1)])
def test_what_cannot_be_measured_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], tuned: str, status: int
) -> None:
    monkeypatch.setenv("PYCOMM_TUNE", tuned)
    assert doctor.main(["--tune", *arguments]) == status
    assert "pycomm doctor --tune" in capsys.readouterr().err
