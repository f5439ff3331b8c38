"""Processes of the doctor's own that are ranks, whatever launcher this one runs in."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pycomm.spawn import ends_with_this_process, same_imports


@contextmanager
def started_ranks(worker: str, num_ranks: int, arguments: Sequence[str]) -> Iterator[list["subprocess.Popen[str]"]]:
    """Run module ``worker`` once a rank, with the arguments STORE NUM_RANKS, ``arguments`` and RANK; whatever happens,
    none is left in the end."""
    with tempfile.TemporaryDirectory(prefix="pycomm-doctor-") as scratch:
        run = f"import runpy; runpy.run_module({worker!r}, run_name='__main__', alter_sys=True)"
        code = f"{same_imports()}\n{ends_with_this_process()}\n{run}"
        command = [sys.executable, "-c", code, str(Path(scratch) / "store"), str(num_ranks), *arguments]
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(num_ranks)
        ]
        try:
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.communicate()


def failure(process: "subprocess.Popen[str]", rank: int, errors: str) -> str:
    """Empty if the rank has ended well, else what it said last."""
    if process.returncode == 0:
        return ""
    lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
    return f"rank {rank}: {lines[-1]}"
