"""`make gpu` on a machine without a GPU, and with parts that fail, hang, or come too late."""

import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.skipif(gpu.missing_gpu() is None, reason="this machine has a GPU")
def test_without_a_gpu_every_part_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    results = json.loads((tmp_path / "gpu_results.json").read_text())
    assert {part["name"] for part in results["parts"]} == {part.name for part in gpu.parts()}
    assert all(part["state"].startswith("not run: no GPU") for part in results["parts"])
    assert results["rows"] == []
    assert done.stdout.splitlines()[-1] == "0 of 6 parts passed, 0 figures measured, 0 below their target"
    assert "not run: no GPU" in (tmp_path / "gpu_results.md").read_text()


def test_every_part_runs_whatever_became_of_those_before(tmp_path):
    row = {"question": "q", "value": 1.0, "unit": "%", "target": "≥ 2 %", "met": False, "detail": ""}
    measure = f"import sys; open(sys.argv[2], 'a').write({json.dumps(row) + chr(10)!r})"
    parts = [
        gpu.Part("fails", "a part that fails", 60, [sys.executable, "-c", "print('why'); raise SystemExit(3)"]),
        gpu.Part("absent", "a program that is not there", 60, ["/nowhere/program"]),
        gpu.Part("hangs", "a part that hangs", 0.5, ["sleep", "1000"]),
        gpu.Part("measures", "a part that measures", 60, [sys.executable, "-c", measure], measures=True),
    ]
    outcomes = gpu.run(parts, tmp_path, None)
    assert [outcome.state.split(":")[0] for outcome in outcomes] == [
        "failed with exit status 3",
        "failed",
        "failed",
        "passed",
    ]
    assert outcomes[0].last_line == "why"
    assert gpu.read_rows(tmp_path) == [row]
    text = gpu.table(outcomes, gpu.read_rows(tmp_path), {"gpu": "none"})
    assert "| q | 1 % | ≥ 2 % | no |  |" in text


def test_parts_that_come_too_late_are_not_begun(tmp_path):
    (outcome,) = gpu.run([gpu.Part("late", "a late part", 60, ["true"])], tmp_path, None, total_s=1.0)
    assert outcome.state == "not run: no time left"


def test_all_parts_fit_into_nine_minutes():
    assert gpu.TOTAL_S <= 540 - 10
    assert sum(part.limit_s for part in gpu.parts()) <= gpu.TOTAL_S + 60
