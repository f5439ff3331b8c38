"""examples/05_pipeline.py runs as it stands, alone and under torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "05_pipeline.py"


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_example_says_that_one_process_agrees(world_size: int) -> None:
    launcher = [] if world_size == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([sys.executable, *launcher, EXAMPLE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"after 20 steps on {world_size} rank(s)" in done.stdout
