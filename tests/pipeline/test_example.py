"""examples/05_pipeline.py and 10_mesh.py run as they stand, alone and under torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_example_says_that_one_process_agrees(world_size: int) -> None:
    assert f"after 20 steps on {world_size} rank(s)" in output_of(world_size, "05_pipeline.py")


@pytest.mark.parametrize(("dp", "pp"), [(1, 1), (2, 2)])
def test_three_axes_agree_with_one_process(dp: int, pp: int) -> None:
    output = output_of(dp * pp, "10_mesh.py", "--dp", dp, "--pp", pp, "--zero", 2)
    assert all(f"one process agrees on replica {replica}'s batch" in output for replica in range(dp))


def output_of(world_size: int, example: str, *options: object) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, *(launcher if world_size > 1 else []), EXAMPLES / example, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
