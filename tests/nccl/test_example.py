"""The example of the NCCL back end runs as it stands, on the stand-in."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from unittest.mock import patch

from pycomm import Communicator
from tests.nccl.helpers import read_by_the_host, run
from tests.pool import Pool

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "09_gpus.py"


def run_example(comm: Communicator) -> None:
    class Given:
        """The communicator of this test, where the example makes its own."""

        def __enter__(self) -> Communicator:
            return comm

        def __exit__(self, *_: object) -> None:
            pass

    with read_by_the_host(), patch("pycomm.init", functools.partial(lambda given, backend: given, Given())):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_example(pool: Pool, standin: Path, tmp_path: Path) -> None:
    run(pool, 2, standin, tmp_path, run_example)
