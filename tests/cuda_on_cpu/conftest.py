"""The kernels, built once for all tests of this folder."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cuda_on_cpu.kernels import Ranks, load
from tests.native import build

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(build(HERE, tmp_path_factory.mktemp("cuda_on_cpu"), PYCOMM_ON_CPU="fibers"))


@pytest.fixture
def make_ranks(library: ctypes.CDLL) -> Iterator[Callable[..., Ranks]]:
    """make_ranks(num_ranks, timeout_ns): virtual ranks that are gone after the test."""
    made: list[Ranks] = []

    def make(*args: int) -> Ranks:
        made.append(Ranks(library, *args))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()
