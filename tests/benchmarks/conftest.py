"""The benchmarks are scripts, not a package: their modules are found the way a script finds its neighbours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
