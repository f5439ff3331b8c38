"""Some rounds of ``make interrupts``, one in each of the phases that a signal used to get lost in."""

from pathlib import Path

import pytest

from tests.pretrain.interrupts import Moment, interrupt
from tests.pretrain.test_cli import SMALL

ARGUMENTS = ["--nproc", "2", "--steps", "1000000", *SMALL]


@pytest.mark.parametrize(
    "moment",
    [
        Moment("", 0.0, whole_group=True, new_cache=False),
        Moment("", 0.7, whole_group=False, new_cache=False),  # torch's launcher is being imported, or starts workers
        Moment("workers", 0.0, whole_group=False, new_cache=False),
    ],
    ids=["first line", "imports", "workers begin"],
)
def test_an_interrupted_start_leaves_nothing(moment: Moment, tmp_path: Path) -> None:
    assert interrupt(moment, tmp_path, ARGUMENTS).faults == []
