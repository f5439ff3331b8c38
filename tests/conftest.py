"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.pool import Pool


def pytest_configure(config: pytest.Config) -> None:
    """Tests of the CPU see no GPU, which "auto" would take; those of GPUs are run alone (``make gpu``)."""
    if not any("tests/gpu" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Persistent worker processes: ``pool.run(world_size, function, *args)``."""
    workers = Pool(str(tmp_path_factory.mktemp("pool")))
    yield workers
    workers.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """As in the pool's workers: the bits of a reference computed in this process depend on its number of threads."""
    torch.set_num_threads(1)
