"""The transport under ThreadSanitizer and AddressSanitizer, with ranks as threads; see transport_driver.cpp."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NUM_CALLS = os.environ.get("PYCOMM_TEST_CALLS", "300")
REPORT = 66  # what a sanitizer exits with, below


def build(folder: Path, sanitizer: str, *targets: str) -> Path:
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    assert cmake is not None
    assert ninja is not None
    configure = [cmake, "-S", str(HERE), "-B", str(folder), "-G", "Ninja", f"-DPYCOMM_SANITIZE={sanitizer}"]
    for command in (configure, [ninja, "-C", str(folder), *targets]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def thread_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("thread"), "thread", "transport_driver", "weakened_driver")


@pytest.fixture(scope="module")
def address_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("address"), "address", "transport_driver")


def drive(program: Path, seed: int, num_ranks: int) -> subprocess.CompletedProcess[str]:
    options = f"halt_on_error=1:exitcode={REPORT}"
    environment = {**os.environ, "TSAN_OPTIONS": options, "ASAN_OPTIONS": options}
    return subprocess.run(
        [str(program), str(seed), str(num_ranks), NUM_CALLS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_no_data_race(thread_build: Path, num_ranks: int) -> None:
    done = drive(thread_build / "transport_driver", num_ranks, num_ranks)
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_no_wrong_address_leak_or_undefined_behaviour(address_build: Path, num_ranks: int) -> None:
    done = drive(address_build / "transport_driver", 10 + num_ranks, num_ranks)
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout


def test_a_release_weakened_to_relaxed_is_reported(thread_build: Path) -> None:
    done = drive(thread_build / "weakened_driver", 1, 2)
    assert done.returncode == REPORT
    assert "data race" in done.stderr
