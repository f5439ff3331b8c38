"""The benchmarks of tensor parallelism as a user runs them: two ranks, tiny shapes, real processes."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script, *options):
    done = subprocess.run([sys.executable, str(FOLDER / script), *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_blocks_end_to_end(tmp_path):
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "step.svg"
    outputs = ["--json", str(rows_file), "--svg", str(picture)]
    run("tensor_parallel.py", "--shapes", "9x14x5", "--budget-s", "0.1", *outputs)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    names = ["pycomm", "DTensor on gloo", "DTensor on pycomm", "products alone"]
    assert [row["contender"] for row in rows] == names
    for row in rows:
        assert row["wrong"] == 0
        assert 0 < row["time_ms_p25"] <= row["time_ms_p50"] <= row["time_ms_p75"]
        assert row["speedup"] > 0
    assert rows[1]["speedup"] == rows[3]["bound_share"] == 1
    drawn = picture.read_text()
    assert drawn.count(">rank 1<") == 1
    assert all(f">{kind}<" in drawn for kind in ("product", "sum", "wait"))


def test_the_loss_end_to_end(tmp_path):
    rows_file = tmp_path / "rows.jsonl"
    run("cross_entropy.py", "--ranks", "2", "--vocab", "50001", "--tokens", "64", "--json", str(rows_file))
    own, gathered = (json.loads(line) for line in rows_file.read_text().splitlines())
    assert own["logits_bytes"] == 64 * 50_001 * 4
    assert gathered["forward_largest_bytes"] >= own["logits_bytes"] > 4 * own["forward_largest_bytes"]
    assert own["shard_bytes"] <= own["backward_largest_bytes"] < 1.1 * own["shard_bytes"]
