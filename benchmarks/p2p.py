"""Point to point: latency (half a ping-pong) and one-way bandwidth, beside gloo and MPI, and beside one memcpy.

``python benchmarks/p2p.py --sizes 8,1K:64M --json out.jsonl``. Ranks 0 and 1 are a pair, 2 and 3 the next, all at once.
"""

from __future__ import annotations

import sys

from harness import main

if __name__ == "__main__":
    sys.exit(main("p2p", ("ping_pong", "send"), "Messages between two ranks, side by side in one run.", "8,1K:256M"))
