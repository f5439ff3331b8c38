"""The transport under ThreadSanitizer and AddressSanitizer, with ranks as threads; see transport_driver.cpp."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.native import REPORT, build, drive

HERE = Path(__file__).resolve().parent
NUM_CALLS = os.environ.get("PYCOMM_TEST_CALLS", "300")


@pytest.fixture(scope="module")
def thread_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        HERE, tmp_path_factory.mktemp("thread"), "transport_driver", "weakened_driver", PYCOMM_SANITIZE="thread"
    )


@pytest.fixture(scope="module")
def address_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(HERE, tmp_path_factory.mktemp("address"), "transport_driver", PYCOMM_SANITIZE="address")


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_no_data_race(thread_build: Path, num_ranks: int) -> None:
    done = drive(thread_build / "transport_driver", num_ranks, num_ranks, NUM_CALLS)
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_no_wrong_address_leak_or_undefined_behaviour(address_build: Path, num_ranks: int) -> None:
    done = drive(address_build / "transport_driver", 10 + num_ranks, num_ranks, NUM_CALLS)
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout


def test_a_release_weakened_to_relaxed_is_reported(thread_build: Path) -> None:
    done = drive(thread_build / "weakened_driver", 1, 2, NUM_CALLS)
    assert done.returncode == REPORT
    assert "data race" in done.stderr
