"""Seeded faults over every layer and both kinds of host, one host and several.

Each case has to catch a survivor that hangs, that raises something else than an error that names the victim and the
victim alone, wherever the news came from, and sockets, memory or processes that are left behind.

PYCOMM_TEST_FAULTS sets how many, PYCOMM_TEST_SEED where they start (`make faults`: 330); a failure prints the case,
which has its seed.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.campaign import FAULTS, IMPOSSIBLE, ONE_HOST, PROGRAMS, Case, problems_of

NUM_FAULTS = int(os.environ.get("PYCOMM_TEST_FAULTS", "10"))
SEED = int(os.environ.get("PYCOMM_TEST_SEED", "0"))
log = logging.getLogger(__name__)


@pytest.mark.parametrize("seed", range(SEED, SEED + NUM_FAULTS))
def test_every_survivor_names_the_victim_and_nothing_is_left(seed: int, tmp_path: Path) -> None:
    case = Case.of(seed)
    problems = problems_of(case, tmp_path)
    assert not problems, "\n".join([str(case), *problems])


def test_a_campaign_covers_everything() -> None:
    """The cases of `make faults` have every program with every fault that it can meet, on each kind of host."""
    cases = [Case.of(seed) for seed in range(330)]
    hosts = Counter((case.program, len(set(case.layout)) > 1) for case in cases)
    faults = Counter((case.program, case.fault) for case in cases)
    log.info("programs, on several hosts or not: %s; faults: %s", dict(hosts), dict(faults))
    assert set(hosts) == {(name, True) for name in PROGRAMS if name not in ONE_HOST} | {
        (name, False) for name in PROGRAMS
    }
    assert set(faults) == set(itertools.product(PROGRAMS, FAULTS)) - IMPOSSIBLE
