"""Random programs over everything: collectives and messages of every kind, over the world and over communicators that
split it in overlapping ways, compared with NumPy, bit for bit, on every rank.

PYCOMM_TEST_CALLS sets how many calls each world size makes, PYCOMM_TEST_SEED where they start (`make random`: 100,000
in all); a failure prints the case, which has its seed.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import random
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pycomm
from pycomm import Communicator
from tests.host.blocks import Arena
from tests.host.collective_cases import Caller, Issued, random_case
from tests.host.message_cases import Exchanged, Exchanger, random_exchange
from tests.pool import TIMEOUT_S, Pool, file_store

NUM_CALLS = int(os.environ.get("PYCOMM_TEST_CALLS", "200"))
SEED = int(os.environ.get("PYCOMM_TEST_SEED", "1"))
NUM_SPLITS = 2
PIECE = 100  # calls between two looks at what is in use, and between two sets of communicators
MOST_IN_FLIGHT = 8
# A case takes at most two tensors of 400,000 bytes a rank, an exchange six that it sends and six that it receives.
CASE_BYTES = 12 * 401_000
ARENA_BYTES = CASE_BYTES + 1_000_000
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A communicator of the program. ``caller`` is None where this rank is not in it."""

    world_size: int
    caller: Caller | None


class Program:
    """The communicators of a program and its calls, by seeds; the same on every rank.

    A rank is in the world and in one group of each split, or in none of it: groups overlap.
    """

    def __init__(self, comm: Communicator, seed: int) -> None:
        rng = random.Random(seed)
        self._arenas = [Arena(comm, ARENA_BYTES)]
        self._groups = []
        world = caller = Caller(comm, self._arenas[0])
        self._parts = [Part(comm.world_size, world)]
        for _ in range(NUM_SPLITS):
            colors = [rng.choice((0, 0, 1, None)) for _ in range(comm.world_size)]
            keys = [rng.randint(-1, 1) for _ in colors]
            group = comm.split(colors[comm.rank], keys[comm.rank])
            mine = None
            if group is not None:
                self._groups.append(group)
                self._arenas.append(Arena(group, ARENA_BYTES))
                mine = caller = Caller(group, self._arenas[-1], world)
            self._parts += [
                Part(colors.count(color), mine if colors[comm.rank] == color else None)
                for color in (0, 1)
                if color in colors
            ]
        world.elsewhere = caller
        self._under_way: deque[Issued | Exchanged] = deque()

    def call(self, seed: int) -> None:
        """One call, if this rank takes part. Checks come in order, some calls later, so that several are in flight."""
        rng = random.Random(seed)
        part = rng.choice(self._parts)
        if part.caller is None:
            return
        full = any(arena.used_bytes > ARENA_BYTES - CASE_BYTES for arena in self._arenas)
        if full or len(self._under_way) >= MOST_IN_FLIGHT:
            self.check()
        kind = rng.random()
        if kind < 0.02:
            part.caller.comm.barrier()
        elif kind < 0.05:
            self._allocate(part.caller, rng)
        elif kind < 0.35:
            exchange = random_exchange(rng, seed, part.world_size)
            self._under_way.append(Exchanger(part.caller).issue(exchange))
        else:
            self._under_way.append(part.caller.issue(random_case(rng, seed, part.world_size)))

    def check(self) -> None:
        while self._under_way:
            self._under_way.popleft().check()
        for arena in self._arenas:
            arena.used_bytes = 0

    def close(self) -> None:
        self.check()
        for group in self._groups:
            group.close()

    def _allocate(self, caller: Caller, rng: random.Random) -> None:
        """The group's symmetric memory anew, in another size: the old is used again by a later one, or unmapped."""
        self.check()
        old, caller.arena = caller.arena, Arena(caller.comm, ARENA_BYTES * rng.randint(1, 3))
        self._arenas[self._arenas.index(old)] = caller.arena


def run_program(comm: Communicator, seeds: list[int]) -> None:
    """The calls of these seeds, in turn."""
    try:
        program = Program(comm, seeds[0])
        for seed in seeds:
            program.call(seed)
        program.close()
    except AssertionError as error:
        comm.abort(str(error))  # so that the others need not wait for their deadline
        raise


@dataclass(frozen=True)
class Usage:
    """What this process holds."""

    resident_bytes: int
    num_mappings: int
    num_descriptors: int
    num_threads: int

    @classmethod
    def now(cls) -> Usage:
        proc = Path("/proc/self")
        return cls(
            int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            len((proc / "maps").read_text().splitlines()),
            len(list((proc / "fd").iterdir())),
            len(list((proc / "task").iterdir())),
        )


def run_long_program(comm: Communicator, first_seed: int, num_calls: int) -> list[Usage]:
    """In pieces, each with communicators of its own; returns what is in use after each, with nothing under way."""
    usages = []
    for start in range(first_seed, first_seed + num_calls, PIECE):
        run_program(comm, list(range(start, min(start + PIECE, first_seed + num_calls))))
        comm.barrier()  # it drops the tensors of asynchronous calls
        gc.collect()
        comm.barrier()  # every rank has released its arenas
        usages.append(Usage.now())
    return usages


def check_flat(usages: list[Usage]) -> None:
    """Whatever leaked something at each piece, or each call, would pass these bounds in a long run."""
    settled = usages[: max(1, len(usages) // 10)]
    last = usages[-1]
    # Nothing is under way at the end of a piece, and its communicators are closed.
    assert last.num_descriptors <= max(usage.num_descriptors for usage in settled), usages
    assert last.num_threads <= max(usage.num_threads for usage in settled), usages
    # What differs is what malloc keeps: at most what all threads of a piece had at once, a stack and an arena with
    # their guard pages (4 mappings) for each of the two threads of each communicator, and some for the main heap.
    num_threads = 2 * (1 + NUM_SPLITS)
    assert last.num_mappings <= max(usage.num_mappings for usage in settled) + 4 * num_threads + 16, usages
    # And of memory: MOST_IN_FLIGHT cases, each in its tensors and in what NumPy computed from all ranks'.
    most_kept = 2 * MOST_IN_FLIGHT * CASE_BYTES
    assert last.resident_bytes <= max(usage.resident_bytes for usage in settled) + most_kept, usages


def report(world_size: int, usages: list[Usage]) -> None:
    for index in sorted({0, len(usages) // 10, len(usages) // 2, len(usages) - 1}):
        log.info("%d ranks, after %d calls, rank 0: %s", world_size, (index + 1) * PIECE, usages[index])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_random_programs(pool: Pool, world_size: int) -> None:
    of_ranks = pool.run(world_size, run_long_program, SEED, NUM_CALLS)
    report(world_size, of_ranks[0])
    for usages in of_ranks:
        check_flat(usages)


def run_without_strict(comm: Communicator, path: str, seeds: list[int]) -> None:
    store = file_store(path, comm.world_size)
    with pycomm.init(store=store, rank=comm.rank, world_size=comm.world_size, timeout_s=TIMEOUT_S) as free:
        run_program(free, seeds)
        free.barrier()


@pytest.mark.parametrize("world_size", [2, 3])
def test_without_strict(pool: Pool, world_size: int, tmp_path: Path) -> None:
    """Small sends return before they are received, and no call carries its issue number."""
    pool.run(world_size, run_without_strict, str(tmp_path / "store"), list(range(SEED, SEED + NUM_CALLS // 3)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world_size=st.integers(2, 4), seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
def test_short_programs(pool: Pool, world_size: int, seeds: list[int]) -> None:
    """Hypothesis makes a failing program shorter."""
    pool.run(world_size, run_program, seeds)


def hold_things(comm: Communicator) -> list[Usage]:
    gc.collect()
    own = comm.split(0)  # the pool's would unmap what earlier tests have released
    assert own is not None
    before = Usage.now()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    memory = own.empty(30_000_000, dtype=torch.uint8).fill_(1)
    with Path("/proc/self/statm").open():
        after = Usage.now()
    done.set()
    thread.join()
    del memory
    own.close()
    return [before, after]


def test_usage_is_what_a_process_holds(pool: Pool) -> None:
    before, after = pool.run(2, hold_things)[0]
    assert after.num_threads == before.num_threads + 1
    assert after.num_descriptors == before.num_descriptors + 1
    assert after.num_mappings > before.num_mappings
    # The kernel counts pages of each thread in batches, and malloc may give some back meanwhile.
    assert after.resident_bytes >= before.resident_bytes + 30_000_000 - 2**20


@pytest.mark.parametrize(
    ("name", "growth"),
    [("num_threads", 1), ("num_descriptors", 1), ("num_mappings", 100), ("resident_bytes", 100_000_000)],
)
def test_growth_is_seen(name: str, growth: int) -> None:
    usage = Usage(500_000_000, 900, 30, 5)
    grown = dataclasses.replace(usage, **{name: getattr(usage, name) + growth})
    check_flat([usage] * 30)
    with pytest.raises(AssertionError):
        check_flat([usage] * 29 + [grown])
