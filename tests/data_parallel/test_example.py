"""The examples of data parallelism run as they stand, alone and under torchrun."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def output_of(example, world_size):
    launcher = [] if world_size == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([sys.executable, *launcher, EXAMPLES / example], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("world_size", [1, 2])
def test_replicas_agree(world_size):
    output = output_of("02_data_parallel.py", world_size)
    assert f"replicas agree: 4801 weights are the same on {world_size} rank(s)" in output


@pytest.mark.parametrize("world_size", [1, 2])
def test_stages_agree_and_a_checkpoint_moves_between_them(world_size):
    output = output_of("11_sharded_optimizer.py", world_size)
    assert "the 82,689 weights are the same bits in all stages" in output
    assert "stage 2 saved, stage 1 loaded: it goes on after step 20" in output
    found = re.search(r"stage 1: .* ([\d,]+) of optimizer states", output)
    states = int(found[1].replace(",", ""))
    # Two fp32 averages; each of the six parameters is cut on a border of norm blocks of 1,024 elements.
    assert abs(states - 82_689 * 8 / world_size) <= (0 if world_size == 1 else 6 * 1024 * 8)
