"""Calls of collectives with everything that can vary about them, and what each must leave behind, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from pycomm import Communicator, Work

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTS = ("int8", "uint8", "int32", "int64")
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter")
CALLS = (*REDUCTIONS, "all_gather", "all_to_all", "gather", "scatter", "broadcast")
IN_PLACE = ("reduce_scatter", "all_gather", "gather", "scatter")  # calls of two tensors that may share memory


@dataclass(frozen=True)
class Case:
    """One call on all ranks of a group.

    Attributes:
        counts: elements from rank s (row) for rank d (column). One row is the same for all ranks: the parts of the
            tensor that has one for each. Calls in place have a single number.
        hosts: the ranks of each host, where the sums of hosts are added; empty: all ranks in order.
        memory: one letter a rank and tensor, "s"ymmetric or "o"rdinary: inputs of all ranks, then outputs.
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
    hosts: tuple[tuple[int, ...], ...] = ()


def case_from_seed(seed: int, world_size: int) -> Case:
    """Any case; a function of its arguments."""
    rng = random.Random(seed)
    call = rng.choice(CALLS)
    dtype = rng.choice(FLOATS + INTS + (() if call in REDUCTIONS else ("bool",)))
    op = rng.choice(("sum", "min", "max", "prod") + (("avg",) if dtype in FLOATS else ()))
    most = rng.choice((0, 3, 70, 1500, 9000, 70_000))  # a slot, one-shot and staged, one slice and several
    by_splits = call in ("reduce_scatter", "all_gather", "all_to_all") and rng.random() < 0.5
    rows = world_size if call == "all_to_all" and by_splits else 1
    if by_splits:
        counts = tuple(tuple(rng.randint(0, most) * rng.randint(0, 1) for _ in range(world_size)) for _ in range(rows))
    else:
        counts = ((rng.randint(0, most),) * (1 if call in ("all_reduce", "reduce", "broadcast") else world_size),)
    memory = rng.choice(("o" * 2 * world_size, "s" * 2 * world_size, "".join(rng.choices("so", k=2 * world_size))))
    return Case(
        call,
        dtype,
        counts,
        memory,
        op=op,
        root=rng.randrange(world_size),
        seed=seed,
        in_place=call in IN_PLACE and rng.random() < 0.4,
        async_op=rng.random() < 0.4,
        by_splits=by_splits,
    )


def values(case: Case, rank: int, count: int) -> torch.Tensor:
    """Different on every rank; floats of many magnitudes, so that the order of additions shows in the bits."""
    generator = torch.Generator().manual_seed(case.seed * 64 + rank)
    if case.dtype == "bool":
        return torch.randint(0, 2, (count,), generator=generator).bool()
    dtype: torch.dtype = getattr(torch, case.dtype)
    if case.dtype in INTS:
        info = torch.iinfo(dtype)
        return torch.randint(info.min // 2, info.max // 2, (count,), generator=generator).to(dtype)
    scale = 10.0 ** torch.randint(-3, 4, (count,), generator=generator)
    return (torch.randn(count, generator=generator) * scale).to(dtype)


def reduced(tensors: list[torch.Tensor], case: Case) -> torch.Tensor:
    """Ranks in order, or those of each host and then the hosts; 16-bit floats accumulate in fp32 and round once."""
    dtype = tensors[0].dtype
    wide = [tensor.float() if dtype in (torch.bfloat16, torch.float16) else tensor for tensor in tensors]
    if case.hosts:
        wide = [in_order([wide[rank] for rank in ranks], case.op) for ranks in case.hosts]
    result = in_order(wide, case.op)
    return (result / len(tensors) if case.op == "avg" else result).to(dtype)


def in_order(tensors: list[torch.Tensor], op: str) -> torch.Tensor:
    accumulator = tensors[0].clone()
    for tensor in tensors[1:]:
        if op in ("sum", "avg"):
            accumulator = accumulator + tensor
        elif op == "prod":
            accumulator = accumulator * tensor
        else:
            accumulator = torch.minimum(accumulator, tensor) if op == "min" else torch.maximum(accumulator, tensor)
    return accumulator


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@dataclass
class Issued:
    """A call under way, or done, and what its tensors must be then."""

    case: Case
    work: Work | None
    expected: list[tuple[torch.Tensor, torch.Tensor]]

    def check(self) -> None:
        if self.work is not None:
            self.work.wait()
        for i, (tensor, expected) in enumerate(self.expected):
            assert bits(tensor) == bits(expected), (i, self.case)


class Arena:
    """Symmetric memory of a rank for the tensors of cases, given out from front to back."""

    def __init__(self, comm: Communicator, num_bytes: int) -> None:
        self._bytes = comm.empty(num_bytes, dtype=torch.uint8)
        self.used_bytes = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        begin, end = self.used_bytes, self.used_bytes + tensor.nbytes
        assert end <= self._bytes.numel(), "the arena is full"
        self.used_bytes = (end + 7) // 8 * 8  # multiples of the largest element, no better
        return self._bytes[begin:end].view(tensor.dtype).view_as(tensor).copy_(tensor)


class Caller:
    """Issues cases on one rank; the same sequence of cases must run on every rank."""

    def __init__(self, comm: Communicator, arena: Arena) -> None:
        self._comm = comm
        self._arena = arena

    def issue(self, case: Case) -> Issued:
        if case.call in ("all_reduce", "reduce", "broadcast"):
            return self._one_tensor(case)
        return self._two_tensors(case)

    def _place(self, tensor: torch.Tensor, symmetric: bool) -> torch.Tensor:
        return self._arena.copy(tensor) if symmetric else tensor.clone()

    def _input(self, case: Case, tensor: torch.Tensor) -> torch.Tensor:
        return self._place(tensor, case.memory[self._comm.rank] == "s")

    def _output(self, case: Case, count: int) -> torch.Tensor:
        garbage = values(case, 63, count)
        return self._place(garbage, case.memory[self._comm.world_size + self._comm.rank] == "s")

    def _one_tensor(self, case: Case) -> Issued:
        comm = self._comm
        inputs = [values(case, rank, case.counts[0][0]) for rank in range(comm.world_size)]
        tensor = self._input(case, inputs[comm.rank])
        if case.call == "broadcast":
            expected = inputs[case.root]
            work = comm.broadcast(tensor, case.root, async_op=case.async_op)
        elif case.call == "reduce":
            expected = reduced(inputs, case) if comm.rank == case.root else inputs[comm.rank]
            work = comm.reduce(tensor, case.root, case.op, async_op=case.async_op)
        else:
            expected = reduced(inputs, case)
            work = comm.all_reduce(tensor, case.op, async_op=case.async_op)
        return Issued(case, work, [(tensor, expected)])

    def _two_tensors(self, case: Case) -> Issued:
        comm, rank = self._comm, self._comm.rank
        inputs, result = expected_of(case, comm.world_size, rank)
        has_input = case.call != "scatter" or rank == case.root
        has_output = case.call != "gather" or rank == case.root
        counts, owner = case.counts[0], rank if case.call in ("reduce_scatter", "all_gather") else case.root
        part = slice(sum(counts[:owner]), sum(counts[: owner + 1]))
        expected = []
        if case.in_place and has_input and has_output and case.call in ("reduce_scatter", "scatter"):
            source = self._input(case, inputs[rank])
            target = source[part]
            whole = inputs[rank].clone()
            whole[part] = result
            expected = [(source, whole)]
        elif case.in_place and has_input and has_output:
            target = self._output(case, result.numel())
            source = target[part].copy_(inputs[rank])
            expected = [(target, result)]
        else:
            source = self._input(case, inputs[rank]) if has_input else None
            target = self._output(case, result.numel()) if has_output else None
            expected = [(source, inputs[rank])] if source is not None else []
            expected += [(target, result)] if target is not None else []
        return Issued(case, self._call(case, target, source), expected)

    def _call(self, case: Case, output: torch.Tensor | None, input: torch.Tensor | None) -> Work | None:
        comm, rank = self._comm, self._comm.rank
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


def expected_of(case: Case, world_size: int, rank: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The inputs of all ranks, and the output of ``rank``, of a call of two tensors."""
    ranks = range(world_size)
    counts = case.counts[0]
    start = sum(counts[:rank])
    if case.call in ("all_gather", "gather"):
        inputs = [values(case, r, counts[r]) for r in ranks]
        return inputs, torch.cat(inputs)
    if case.call == "all_to_all" and case.by_splits:
        inputs = [values(case, r, sum(case.counts[r])) for r in ranks]
        parts = [i[sum(row[:rank]) : sum(row[: rank + 1])] for i, row in zip(inputs, case.counts, strict=True)]
        return inputs, torch.cat(parts)
    inputs = [values(case, r, sum(counts)) for r in ranks]
    parts = [tensor[start : start + counts[rank]] for tensor in inputs]
    if case.call == "reduce_scatter":
        return inputs, reduced(parts, case)
    return inputs, parts[case.root] if case.call == "scatter" else torch.cat(parts)
