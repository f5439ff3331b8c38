"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Persistent worker processes: ``pool.run(world_size, function, *args)``."""
    workers = Pool(str(tmp_path_factory.mktemp("pool")))
    yield workers
    workers.close()
