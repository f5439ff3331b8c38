"""What ranks agree on beside NCCL goes over the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nccl.helpers import run
from tests.pool import Pool
from tests.test_agree import agreements


@pytest.mark.parametrize("world_size", [1, 3])
def test_agreements(pool: Pool, standin: Path, tmp_path: Path, world_size: int) -> None:
    run(pool, world_size, standin, tmp_path, agreements)
