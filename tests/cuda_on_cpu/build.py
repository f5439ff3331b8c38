"""Builds tests/cuda_on_cpu: the kernels as C++, as a library or under a sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent


def build(folder: Path, kind: str) -> Path:
    """``kind``: "fibers", "thread" or "address"; returns ``folder``, with what CMakeLists.txt says."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    assert cmake is not None
    assert ninja is not None
    configure = [cmake, "-S", str(HERE), "-B", str(folder), "-G", "Ninja", f"-DPYCOMM_ON_CPU={kind}"]
    for command in (configure, [ninja, "-C", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder
