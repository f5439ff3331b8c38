"""Random programs of collectives, compared with torch in one process, bit for bit, on every rank.

PYCOMM_TEST_CALLS sets how many calls each world size makes, PYCOMM_TEST_SEED where they start; a failure prints the
case, which has its seed.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pycomm import Communicator
from tests.host.collective_cases import Arena, Caller, Issued, case_from_seed
from tests.pool import Pool

NUM_CALLS = int(os.environ.get("PYCOMM_TEST_CALLS", "300"))
SEED = int(os.environ.get("PYCOMM_TEST_SEED", "1"))
ARENA_BYTES = 16 << 20  # the largest case takes 2 tensors of 4 ranks * 70,000 elements * 8 bytes
MOST_IN_FLIGHT = 8


def num_mappings() -> int:
    """Of shared segments."""
    return sum("pycomm" in line for line in Path("/proc/self/maps").read_text().splitlines())


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def run_program(comm: Communicator, seeds: list[int]) -> None:
    """The cases of these seeds, in turn. Checks come in order, some calls later, so that several are in flight."""
    arena = Arena(comm, ARENA_BYTES)
    caller = Caller(comm, arena)
    under_way: deque[Issued] = deque()
    for seed in seeds:
        if arena.used_bytes > ARENA_BYTES // 2 or len(under_way) >= MOST_IN_FLIGHT:
            while under_way:
                under_way.popleft().check()
            arena.used_bytes = 0
        under_way.append(caller.issue(case_from_seed(seed, comm.world_size)))
    for issued in under_way:
        issued.check()


def run_long_program(comm: Communicator, first_seed: int, num_calls: int) -> None:
    """In pieces; what they allocate is given back, so that mappings and descriptors do not grow."""
    piece = 100
    before = None
    for start in range(first_seed, first_seed + num_calls, piece):
        run_program(comm, list(range(start, min(start + piece, first_seed + num_calls))))
        comm.barrier()  # it drops the tensors of asynchronous calls
        gc.collect()
        comm.barrier()  # every rank has released its arena, so that the next one reuses it
        after = num_mappings(), num_descriptors()
        before = before or after
        # Fewer are possible: an allocation unmaps what earlier tests have released.
        assert all(now <= then for now, then in zip(after, before, strict=True)), (start, before, after)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_random_programs(pool: Pool, world_size: int) -> None:
    pool.run(world_size, run_long_program, SEED, NUM_CALLS)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world_size=st.integers(2, 4), seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
def test_short_programs(pool: Pool, world_size: int, seeds: list[int]) -> None:
    """Hypothesis makes a failing program shorter."""
    pool.run(world_size, run_program, seeds)
