"""Every collective of pycomm beside gloo, Open MPI and MPICH, and beside the bound of the machine.

``python benchmarks/collectives.py --ranks 2 --ops reduce_scatter,all_gather --sizes 1K:64M --json out.jsonl``
"""

from __future__ import annotations

import sys

from harness import main
from operations import COLLECTIVES

if __name__ == "__main__":
    sys.exit(main("collectives", COLLECTIVES, "Every collective, side by side in one run."))
