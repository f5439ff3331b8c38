"""The kernels under both sanitizers, and every weakened ordering reported; see kernels_driver.cpp."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.native import REPORT, build, drive

NUM_ROUNDS = int(os.environ.get("PYCOMM_TEST_ROUNDS", "4"))
# A CUDA thread is an OS thread: four and eight ranks are for long runs.
WORLDS = [1, 2, 3, 4, 8] if NUM_ROUNDS > 4 else [1, 2, 3]
HERE = Path(__file__).resolve().parent
SIGNAL = HERE.parent.parent / "csrc" / "cuda" / "device" / "signal.cuh"


def orderings() -> list[str]:
    """The names in signal.cuh's enum Ordering: a new one is tested as it comes."""
    (body,) = re.findall(r"enum class Ordering \{(.*?)\};", SIGNAL.read_text(), flags=re.DOTALL)
    return re.findall(r"^\s*(k\w+),", body, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def thread_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(HERE, tmp_path_factory.mktemp("thread"), PYCOMM_ON_CPU="thread") / "cuda_on_cpu"


@pytest.fixture(scope="module")
def address_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(HERE, tmp_path_factory.mktemp("address"), PYCOMM_ON_CPU="address") / "cuda_on_cpu"


@pytest.mark.parametrize("num_ranks", WORLDS)
def test_no_data_race(thread_build: Path, num_ranks: int) -> None:
    done = drive(thread_build, 10 * num_ranks, num_ranks, NUM_ROUNDS)
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout


@pytest.mark.parametrize("num_ranks", WORLDS)
def test_no_wrong_address_leak_or_undefined_behaviour(address_build: Path, num_ranks: int) -> None:
    done = drive(address_build, 10 * num_ranks, num_ranks, NUM_ROUNDS)
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout


@pytest.mark.parametrize("ordering", orderings())
def test_a_weakened_ordering_is_reported(thread_build: Path, ordering: str) -> None:
    done = drive(thread_build, 1, 2, NUM_ROUNDS, orderings().index(ordering))
    assert done.returncode == REPORT, done.stdout + done.stderr
    assert "data race" in done.stderr


def test_every_ordering_is_used() -> None:
    text = SIGNAL.read_text()
    assert len(orderings()) == 9
    assert [name for name in orderings() if f"Ordering::{name}>" not in text] == []
