"""All-reduce (sum) of pycomm beside gloo, Open MPI, MPICH and DeepSpeed, and beside the bound of the machine.

``python benchmarks/allreduce.py --ranks 2 --sizes 1K:256M --json out.jsonl --plot out.png``
"""

from __future__ import annotations

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("allreduce", ("all_reduce",), "All-reduce (sum), side by side in one run."))
