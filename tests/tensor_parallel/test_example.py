"""examples/08_tensor_parallel.py runs as it stands, alone and under torchrun, to the same losses."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "08_tensor_parallel.py"


def losses(launcher):
    done = subprocess.run([sys.executable, *launcher, EXAMPLE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "whole model: " in done.stdout
    return [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]


def test_the_example_learns_the_same_on_two_ranks():
    alone = losses([])
    assert len(alone) == 4
    assert alone[-1] < alone[0]
    both = losses(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    # Printed with four decimals. AdamW turns rounding noise of gradients near zero into steps of lr, at most 40 of them
    # a weight, so that this is a check of the example and not of the arithmetic, which test_models.py compares.
    assert max(abs(a - b) for a, b in zip(alone, both, strict=True)) < 0.05
