"""benchmarks/pipeline.py as a user runs it: two ranks, a tiny model, real processes."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "pipeline.py"
TINY = "--layers 2 --hidden 16 --heads 2 --vocab 32 --seq 8 --microbatches 4 --steps 2"
CONTENDERS = ["torch-1f1b", "torch-interleaved-2", "pycomm-1f1b", "pycomm-zb_h1", "pycomm-1f1b-automatic"]


def test_two_ranks_end_to_end(tmp_path):
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "picture.svg"
    outputs = ["--json", str(rows_file), "--svg", str(picture)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY.split(), "--contenders", ",".join(CONTENDERS), *outputs],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [row["contender"] for row in rows] == CONTENDERS
    for row in rows:
        assert 0 < row["step_ms_p25"] <= row["step_ms_p50"] <= row["step_ms_p75"]
        assert abs(row["loss"] - rows[0]["loss"]) < 1e-4 * rows[0]["loss"]
        assert ("simulated_ms" in row) == row["contender"].startswith("pycomm")
    assert "host" in rows[0]
    drawn = picture.read_text()
    assert all(f"pycomm-{name}, {what}" in drawn for name in ("1f1b", "zb_h1") for what in ("measured", "simulated"))


def test_an_unknown_contender_is_named():
    done = subprocess.run([sys.executable, str(SCRIPT), "--contenders", "mpi"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no contender mpi" in done.stderr
