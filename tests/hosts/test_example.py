"""The example runs as it stands, alone and on ranks of one host."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "07_several_hosts.py"


def test_the_example_runs_as_it_stands() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 0: shm; the ranks of my host are [0], by shm" in done.stdout
