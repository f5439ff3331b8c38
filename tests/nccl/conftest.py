"""The stand-in, built once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for NCCL and the CUDA driver, one shared library."""
    compiler = shutil.which("c++")
    assert compiler is not None, "a C++ compiler is needed, as for pycomm itself"
    library = tmp_path_factory.mktemp("standin") / "libstandin.so"
    sources = sorted((ROOT / "tests" / "nccl" / "standin").glob("*.cpp"))
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", *includes, *map(str, sources)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return library
