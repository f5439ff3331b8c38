"""What ranks agree on: rows that all see, and actions that succeed on every rank or on none. On every back end."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pycomm import Communicator
from pycomm.backends.agreement import MOST_NUMBERS, digest
from pycomm.errors import MismatchError, PycommError
from tests.hosts.helpers import Hosts
from tests.pool import Pool
from tests.processes import Ranks


def agreements(comm: Communicator, _: Any = None) -> None:
    rank, n = comm.rank, comm.world_size
    row = [rank, -rank, 2**63 - 1, rank + 0.5, -0.0, float("inf"), True]
    rows = comm.agree(row)
    assert rows == [[r, -r, 2**63 - 1, r + 0.5, -0.0, float("inf"), 1] for r in range(n)]
    assert [type(number) for number in rows[0]] == [int, int, int, float, float, float, int]
    assert all(math.copysign(1, other[4]) == -1 for other in rows)
    assert all(math.isnan(value) for (value,) in comm.agree([float("nan")]))
    assert comm.agree([]) == [[]] * n
    assert comm.agree((torch.tensor(rank),)) == [[r] for r in range(n)]
    most = list(range(rank, rank + MOST_NUMBERS))
    assert comm.agree(most) == [list(range(r, r + MOST_NUMBERS)) for r in range(n)]
    part = comm.split(rank % 2)
    assert part is not None
    assert part.agree([rank]) == [[r] for r in range(n) if r % 2 == rank % 2]
    refusals(comm)
    if n > 1:
        differences(comm)
    all_or_none(comm)
    assert comm.agree([1]) == [[1]] * n


def refusals(comm: Communicator) -> None:
    """Nothing was sent, so one rank alone may be refused."""
    if comm.rank == 0:
        with pytest.raises(ValueError, match="agree: 9223372036854775808 is no int of 64 bits"):
            comm.agree([2**63])
        with pytest.raises(TypeError, match="agree: 'a' is in the row: it is neither an int nor a float"):
            comm.agree(["a"])  # type: ignore[type-var]
        with pytest.raises(TypeError, match="agree: row is 3"):
            comm.agree(3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="agree: row is 'text'"):
            comm.agree("text")  # type: ignore[type-var]
        with pytest.raises(ValueError, match=f"a row of {MOST_NUMBERS + 1} numbers.*all_gather"):
            comm.agree([0] * (MOST_NUMBERS + 1))


def differences(comm: Communicator) -> None:
    last = comm.world_size - 1
    with pytest.raises(MismatchError) as lengths:
        comm.agree([0] * (1 + (comm.rank == last)))
    assert lengths.value.calls == {r: f"agree(row[{1 + (r == last)}])" for r in range(comm.world_size)}
    with pytest.raises(MismatchError, match=r"rank 0 (called )?agree\(row\[1\]\)") as calls:
        if comm.rank == 0:
            comm.agree([0])
        else:
            comm.empty(3)
    assert calls.value.calls[last] == "empty(12 bytes)"


def all_or_none(comm: Communicator) -> None:
    rank, last = comm.rank, comm.world_size - 1
    assert comm.all_or_none(lambda: rank) == rank

    def fail(kind: type[Exception], text: str) -> int:
        if rank == last:
            raise kind(text)
        return rank

    with pytest.raises(PycommError) as failed:
        comm.all_or_none(lambda: fail(FileNotFoundError, "no file here"))
    assert str(failed.value) == f"FileNotFoundError: no file here (rank {last})"
    assert type(failed.value) is PycommError
    assert isinstance(failed.value.__cause__, FileNotFoundError) == (rank == last)
    with pytest.raises(MemoryError, match=rf"^too little \(rank {last}\)$"):
        comm.all_or_none(lambda: fail(MemoryError, "too little"))
    with pytest.raises(PycommError, match=rf"^AssertionError \(rank {last}\)$"):
        comm.all_or_none(lambda: fail(AssertionError, ""))
    with pytest.raises(PycommError, match="^OSError: é{251} "):  # a text is cut between two letters
        comm.all_or_none(lambda: fail(OSError, "é" * 1000))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_on_shared_memory(pool: Pool, world_size: int) -> None:
    pool.run(world_size, agreements)


@pytest.mark.parametrize(("layout", "backend"), [("aab", "auto"), ("abc", "gloo")])
def test_between_hosts(layout: str, backend: str) -> None:
    with Hosts(layout, agreements, backend=backend, strict=True) as hosts:
        hosts.results()


def alone(comm: Communicator, _: Any) -> None:
    if comm.rank == 1:
        os._exit(3)
    comm.agree([1, 2.0])


def test_a_dead_rank_is_named(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, alone) as ranks:
        (kind, message, fields), _ = ranks.result(0)
        assert (kind, fields["lost_ranks"]) == ("PeerLostError", [1])
        assert "agree(row[2])" in message


def test_digests_are_numbers_of_a_row() -> None:
    assert digest("a") == digest("a") != digest("b")
    assert 0 < digest("a") <= 2**62
