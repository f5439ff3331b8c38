"""Every collective over fake hosts, bit for bit as one process computes it: the ranks of each host, then the hosts."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from pycomm import Communicator
from pycomm.errors import MismatchError
from tests.host.blocks import FLOATS, INTS, Arena, bits, values
from tests.host.collective_cases import (
    CALLS,
    IN_PLACE,
    ONE_TENSOR,
    REDUCTIONS,
    Caller,
    Case,
    Issued,
    random_case,
    reduced,
)
from tests.host.reduce_reference import CASES, STORAGE, reference, some_sources
from tests.hosts.helpers import LAYOUTS, Hosts, hosts_of

Layout = tuple[tuple[int, ...], ...]


def random_cases(comm: Communicator, _: Any, hosts: Layout, first: int, count: int) -> None:
    """Several in flight, some asynchronous, with splits, in place, in symmetric memory."""
    arena = Arena(comm, 16 << 20)
    caller = Caller(comm, arena, Caller(comm, arena))
    under_way: deque[Issued] = deque()
    for seed in range(first, first + count):
        if arena.used_bytes > 8 << 20 or len(under_way) > 6:
            while under_way:
                under_way.popleft().check()
            arena.used_bytes = 0
        under_way.append(caller.issue(replace(random_case(random.Random(seed), seed, comm.world_size), hosts=hosts)))
    for issued in under_way:
        issued.check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_programs(layout: str) -> None:
    with Hosts(layout, random_cases, hosts_of(layout), 1, 120) as hosts:
        hosts.results()


@pytest.mark.parametrize("layout", ["aabb", "aa", "a"])
def test_random_programs_over_gloo_alone(layout: str) -> None:
    """No host is seen, so the sums are those of one host."""
    with Hosts(layout, random_cases, (), 1000, 120, backend="gloo") as hosts:
        hosts.results()


def every_call(comm: Communicator, _: Any, hosts: Layout) -> None:
    """All calls, dtypes and ops in turn, on ordinary and symmetric memory, in place or not."""
    n = comm.world_size
    arena = Arena(comm, 1 << 20)
    caller = Caller(comm, arena)
    for call in CALLS:
        for number, dtype in enumerate((*FLOATS, *INTS, *(() if call in REDUCTIONS else ("bool",)))):
            ops = ("sum", "min", "max", "prod", *(("avg",) if dtype in FLOATS and call != "scan" else ()))
            for op, count in product(ops if call in REDUCTIONS else ("sum",), (0, 1, 1003)):
                arena.used_bytes = 0
                case = Case(
                    call,
                    dtype,
                    counts=((count,) * (1 if call in ONE_TENSOR else n),),
                    memory="son"[number % 3] * 2 * n,
                    op=op,
                    root=(number + count) % n,
                    seed=count,
                    in_place=call in IN_PLACE and number % 3 == 0,
                    hosts=hosts,
                )
                caller.issue(case).check()


@pytest.mark.parametrize("layout", ["aabb", "abb"])
def test_every_call_dtype_and_op(layout: str) -> None:
    with Hosts(layout, every_call, hosts_of(layout)) as hosts:
        hosts.results()


def any_bits(comm: Communicator, _: Any) -> None:
    """NaN, infinities, subnormals, overflow: over gloo alone as on one host, in the bits of docs/determinism.md."""
    for number, (dtype, op) in enumerate(CASES):
        sources = some_sources(dtype, comm.world_size, 257, number)
        kind = torch.bfloat16 if dtype == "bfloat16" else getattr(torch, dtype)
        raw = sources[comm.rank].view(np.int16) if dtype == "bfloat16" else sources[comm.rank]
        tensor = torch.from_numpy(raw.copy()).view(kind)
        comm.all_reduce(tensor, op)
        assert bits(tensor) == reference(dtype, op, sources).view(STORAGE[dtype]).tobytes(), (dtype, op)


def test_any_bits_over_gloo_alone() -> None:
    with Hosts("abc", any_bits, backend="gloo") as hosts:
        hosts.results()


def sixteen_bits_round_once(comm: Communicator, _: Any) -> None:
    # 1 + 2**-9 + 2**-9 is a bfloat16 only if no partial sum was rounded to one (steps of 2**-7 above 1): each addend
    # alone is lost, and so is the sum of the second host if it meets a rounded 1.
    tensor = torch.tensor([1.0 if comm.rank == 0 else 2.0**-8 * 1.25], dtype=torch.bfloat16)
    comm.all_reduce(tensor)
    expected = torch.tensor([1.0 + 3 * 2.0**-8 * 1.25]).to(torch.bfloat16)
    assert torch.equal(tensor, expected)


def test_sixteen_bit_floats_round_once() -> None:
    with Hosts("aabb", sixteen_bits_round_once) as hosts:
        hosts.results()


def same_bits_in_every_piece(comm: Communicator, _: Any, hosts: Layout) -> None:
    """Where a tensor is cut does not show in the bits, nor which rank owns what."""
    case = Case("all_reduce", "float32", ((10_007,),), "oooo", hosts=hosts)
    inputs = [values("float32", 10_007, rank) for rank in range(comm.world_size)]
    whole = torch.from_numpy(inputs[comm.rank].copy())
    comm.all_reduce(whole)
    pieces = torch.from_numpy(inputs[comm.rank].copy())
    for piece in pieces.split(1013):
        comm.all_reduce(piece)
    assert bits(whole) == bits(pieces) == reduced(case, inputs).tobytes()


@pytest.mark.parametrize("layout", ["aabb", "baab", "aaab"])
def test_bits_do_not_depend_on_how_a_message_is_cut(layout: str) -> None:
    with Hosts(layout, same_bits_in_every_piece, hosts_of(layout)) as hosts:
        hosts.results()


def different_calls(comm: Communicator, _: Any) -> list[dict[int, str]]:
    tensor = torch.ones(8)
    found = []
    with pytest.raises(MismatchError) as caught:
        if comm.rank == 3:
            comm.broadcast(tensor, root=1)
        else:
            comm.all_reduce(tensor, "max")
    found.append(caught.value.calls)
    with pytest.raises(MismatchError) as caught:
        comm.all_reduce(torch.ones(8 + comm.rank // 2))
    found.append(caught.value.calls)
    splits = [[1, 1, 1, 1], [1, 2, 1, 1]][comm.rank == 2]
    work = comm.all_to_all(torch.ones(4), torch.ones(sum(splits)), [1] * 4, splits, async_op=True)
    with pytest.raises(MismatchError, match="rank 2 sends 2 to rank 1, rank 1 takes 1 from rank 2"):
        assert work is not None
        work.wait()
    with pytest.raises(MismatchError):
        comm.empty(100 * (1 + comm.rank % 2))
    assert (tensor == 1).all()
    comm.all_reduce(tensor)  # nothing was poisoned
    assert (tensor == 4).all()
    return found


def test_mismatched_calls_raise_everywhere_and_name_who_called_what() -> None:
    with Hosts("aabb", different_calls) as hosts:
        for calls, counts in hosts.results():
            assert calls == dict.fromkeys(range(3), "all_reduce(max, float32[8])") | {
                3: "broadcast(root=1, float32[8])"
            }
            assert counts == {r: f"all_reduce(sum, float32[{8 + r // 2}])" for r in range(4)}


def memory_and_parts(comm: Communicator, _: Any) -> tuple[str, str, list[int]]:
    """Symmetric memory inside a host, groups of any ranks, and what a group of one host is."""
    tensor = comm.empty(3, 5)
    tensor.fill_(comm.rank)
    with pytest.raises(ValueError, match="peers: this group is on 2 hosts .ranks 0 2; 1 3."):
        comm.peers(tensor)
    host = comm.split(comm.rank % 2)
    across = comm.split(comm.rank // 2, key=-comm.rank)
    nobody = comm.split(None if comm.rank else 0)
    assert host is not None
    assert across is not None
    assert (nobody is None) == (comm.rank != 0)
    total = torch.tensor([float(comm.rank)])
    across.all_reduce(total)
    assert total.item() == {0: 1.0, 1: 5.0}[comm.rank // 2]
    assert across.rank == 1 - comm.rank % 2
    mine = host.empty(4)
    mine.fill_(comm.rank)
    host.barrier()
    seen = [int(part[0]) for part in host.peers(mine)]
    across.close()
    comm.all_reduce(tensor)
    assert (tensor == 6).all()
    return host.backend, across.backend, seen


def test_symmetric_memory_and_split() -> None:
    with Hosts("abab", memory_and_parts) as hosts:
        for rank, outcome in enumerate(hosts.results()):
            assert outcome == ("shm", "gloo+shm", [rank % 2, rank % 2 + 2])
