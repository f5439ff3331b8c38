"""Builds the C++ of tests that have some, and runs it under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

REPORT = 66  # what a program exits with when a sanitizer has something to report


def build(source: Path, folder: Path, *targets: str, **options: str) -> Path:
    """Configure ``source``'s CMakeLists.txt with ``options`` and build ``targets`` (all) in ``folder``; return that."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    assert cmake is not None
    assert ninja is not None
    defines = [f"-D{name}={value}" for name, value in options.items()]
    configure = [cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja", *defines]
    for command in (configure, [ninja, "-C", str(folder), *targets]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def drive(program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Run a program that was built with a sanitizer, up to the first report."""
    options = f"halt_on_error=1:exitcode={REPORT}"
    environment = {**os.environ, "TSAN_OPTIONS": options, "ASAN_OPTIONS": options}
    command = [str(program), *(str(arg) for arg in args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
