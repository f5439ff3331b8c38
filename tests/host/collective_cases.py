"""Calls of collectives with everything that can vary about them, and what each must leave behind, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from pycomm import Communicator, Work
from tests.host.blocks import FLOATS, INTS, Arena, Block, values
from tests.host.reduce_reference import Raw, narrow, reference, widen

REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "scan")
CALLS = (*REDUCTIONS, "all_gather", "all_to_all", "gather", "scatter", "broadcast")
IN_PLACE = ("reduce_scatter", "all_gather", "gather", "scatter")  # calls of two tensors that may share memory
ONE_TENSOR = ("all_reduce", "reduce", "broadcast", "scan")
# Bytes of a rank's largest tensor: none or one element, in a slot, one-shot and staged, one slice and several.
MOST_BYTES = (0, 8, 60, 1000, 5000, 40_000, 400_000)


@dataclass(frozen=True)
class Case:
    """One call on all ranks of a group.

    Attributes:
        counts: elements from rank s (row) for rank d (column). One row is the same for all ranks: the parts of the
            tensor that has one for each. Calls of one tensor have a single number.
        memory: one letter a rank and tensor, inputs of all ranks, then outputs: "s"ymmetric, "o"rdinary, a "n"umpy
            array, or symmetric memory of another communicator ("e"lsewhere), which is ordinary for this one.
        hosts: the ranks of each host, where the sums of hosts are added; empty: all ranks in order.
        offset: elements by which this case's tensors are off from the start of their memory.
    """

    call: str
    dtype: str
    counts: tuple[tuple[int, ...], ...]
    memory: str
    op: str = "sum"
    root: int = 0
    seed: int = 0
    in_place: bool = False
    async_op: bool = False
    by_splits: bool = False
    offset: int = 0
    hosts: tuple[tuple[int, ...], ...] = ()


def random_memory(rng: random.Random, num_tensors: int) -> str:
    """One letter a tensor: all of one kind, or any."""
    kind = rng.choice("sssoonem")
    return "".join(rng.choices("sone", k=num_tensors)) if kind == "m" else kind * num_tensors


def random_case(rng: random.Random, seed: int, world_size: int) -> Case:
    """Any case."""
    call = rng.choice(CALLS)
    dtype = rng.choice(FLOATS + INTS + (() if call in REDUCTIONS else ("bool",)))
    op = rng.choice(("sum", "min", "max", "prod") + (("avg",) if dtype in FLOATS and call != "scan" else ()))
    itemsize = 1 if dtype == "bool" else len(values(dtype, 1, 0).tobytes())
    most = rng.choice(MOST_BYTES) // itemsize
    by_splits = call in ("reduce_scatter", "all_gather", "all_to_all") and rng.random() < 0.5
    if by_splits:
        rows = world_size if call == "all_to_all" else 1
        counts = tuple(
            tuple(rng.randint(0, most // world_size) * rng.randint(0, 1) for _ in range(world_size))
            for _ in range(rows)
        )
    elif call in ONE_TENSOR:
        counts = ((rng.randint(0, most),),)
    else:
        counts = ((rng.randint(0, most // world_size),) * world_size,)
    return Case(
        call,
        dtype,
        counts,
        random_memory(rng, 2 * world_size),
        op=op,
        root=rng.randrange(world_size),
        seed=seed,
        in_place=call in IN_PLACE and rng.random() < 0.4,
        async_op=rng.random() < 0.4,
        by_splits=by_splits,
        offset=rng.choice((0, 0, 1, 7)),
    )


def inputs_of(case: Case, world_size: int) -> list[Raw]:
    """What every rank puts in, by rank. Different on every rank."""

    def count(rank: int) -> int:
        counts = case.counts[0]
        if case.call in ("all_gather", "gather"):
            return counts[rank]
        return sum(case.counts[rank] if len(case.counts) > 1 else counts)

    return [values(case.dtype, count(rank), 64 * case.seed + rank) for rank in range(world_size)]


def reduced(case: Case, sources: list[Raw]) -> Raw:
    """All ranks in order; or the ranks of each host, then the hosts, one rounding and one division at the end."""
    if not case.hosts:
        return reference(case.dtype, case.op, sources)
    wide = "float32" if case.dtype in ("bfloat16", "float16") else case.dtype
    op = "sum" if case.op == "avg" else case.op
    values = [widen(case.dtype, source) for source in sources]
    total = reference(wide, op, [reference(wide, op, [values[rank] for rank in ranks]) for ranks in case.hosts])
    return narrow(case.dtype, total / total.dtype.type(len(sources)) if case.op == "avg" else total)


def expected_of(case: Case, inputs: list[Raw], rank: int) -> Raw:
    """The output of ``rank``, of a call of one tensor: its tensor afterwards."""
    if case.call == "broadcast":
        return inputs[case.root]
    if case.call == "scan":  # in rank order, on several hosts, too
        return reference(case.dtype, case.op, inputs[: rank + 1])
    if case.call in ("all_reduce", "reduce"):
        takes_part = case.call == "all_reduce" or rank == case.root
        return reduced(case, inputs) if takes_part else inputs[rank]
    if case.call in ("all_gather", "gather"):
        return np.concatenate(inputs)
    rows = case.counts if len(case.counts) > 1 else case.counts * len(inputs)
    parts = [raw[sum(row[:rank]) : sum(row[: rank + 1])] for raw, row in zip(inputs, rows, strict=True)]
    if case.call == "reduce_scatter":
        return reduced(case, parts)
    return parts[case.root] if case.call == "scatter" else np.concatenate(parts)


@dataclass
class Issued:
    """A call under way, or done, and what its tensors must be then."""

    case: Any
    work: Work | None
    expected: list[tuple[Block, Raw]]

    def check(self) -> None:
        if self.work is not None:
            self.work.wait()
        for i, (block, expected) in enumerate(self.expected):
            difference = block.difference(expected)
            assert not difference, f"tensor {i}: {difference}: {self.case}"


class Caller:
    """Issues cases on one rank; the same sequence of cases must run on every rank.

    Args:
        arena: symmetric memory of ``comm``.
        elsewhere: of another communicator, whose arena is not symmetric memory here.
    """

    def __init__(self, comm: Communicator, arena: Arena, elsewhere: Caller | None = None) -> None:
        self.comm = comm
        self.arena = arena
        self.elsewhere = elsewhere

    def issue(self, case: Case) -> Issued:
        comm, rank = self.comm, self.comm.rank
        inputs = inputs_of(case, comm.world_size)
        result = expected_of(case, inputs, rank)
        if case.call in ONE_TENSOR:
            block = self.block(case, inputs[rank], rank)
            return Issued(case, self._one_tensor(case, block.whole()), [(block, result)])
        source, target, expected = self._tensors(case, inputs[rank], result)
        return Issued(case, self._two_tensors(case, target, source), expected)

    def block(self, case: Any, raw: Raw, tensor: int) -> Block:
        """``raw`` in the memory that the case has for this tensor."""
        kind = case.memory[tensor]
        home = self if kind == "s" else self.elsewhere if kind == "e" else None
        arena = home.arena if home is not None else None
        return Block.of(raw, case.dtype, arena=arena, as_numpy=kind == "n", offset=case.offset)

    def _tensors(self, case: Case, mine: Raw, result: Raw) -> tuple[Any, Any, list[tuple[Block, Raw]]]:
        """The call's input and output on this rank (None: it has none), and what must be in their memory after it."""
        n, rank = self.comm.world_size, self.comm.rank
        has_input = case.call != "scatter" or rank == case.root
        has_output = case.call != "gather" or rank == case.root
        counts, owner = case.counts[0], rank if case.call in ("reduce_scatter", "all_gather") else case.root
        start, count = sum(counts[:owner]), counts[owner]
        garbage = values(case.dtype, len(result), 64 * case.seed + 63)
        if case.in_place and has_input and has_output:
            if case.call in ("reduce_scatter", "scatter"):
                block = self.block(case, mine, rank)
                after = mine.copy()
                after[start : start + count] = result
                return block.whole(), block.part(start, count), [(block, after)]
            block = self.block(case, garbage, n + rank)
            block.raw()[start : start + count] = mine
            return block.part(start, count), block.whole(), [(block, result)]
        source = self.block(case, mine, rank) if has_input else None
        target = self.block(case, garbage, n + rank) if has_output else None
        expected = [(source, mine)] if source is not None else []
        expected += [(target, result)] if target is not None else []
        return source and source.whole(), target and target.whole(), expected

    def _one_tensor(self, case: Case, tensor: Any) -> Work | None:
        if case.call == "broadcast":
            return self.comm.broadcast(tensor, case.root, async_op=case.async_op)
        if case.call == "scan":
            return self.comm.scan(tensor, case.op, async_op=case.async_op)
        if case.call == "reduce":
            return self.comm.reduce(tensor, case.root, case.op, async_op=case.async_op)
        return self.comm.all_reduce(tensor, case.op, async_op=case.async_op)

    def _two_tensors(self, case: Case, output: Any, input: Any) -> Work | None:
        comm, rank = self.comm, self.comm.rank
        splits = list(case.counts[0]) if case.by_splits else None
        if case.call == "reduce_scatter":
            return comm.reduce_scatter(output, input, case.op, splits, async_op=case.async_op)
        if case.call == "all_gather":
            return comm.all_gather(output, input, splits, async_op=case.async_op)
        if case.call == "gather":
            return comm.gather(output, input, case.root, async_op=case.async_op)
        if case.call == "scatter":
            return comm.scatter(output, input, case.root, async_op=case.async_op)
        if not case.by_splits:
            return comm.all_to_all(output, input, async_op=case.async_op)
        received = [row[rank] for row in case.counts]
        return comm.all_to_all(output, input, received, list(case.counts[rank]), async_op=case.async_op)
