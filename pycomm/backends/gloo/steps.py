"""The steps of collectives between hosts: shared memory inside each host, gloo between them.

Two steps make most of them. Every part of a tensor has an owner, a rank; on each other host one rank is the owner's
agent (``Topology.agent``), so that all ranks of a host send and receive at once.

    reduce_parts   each host reduces its own ranks' input and leaves each part with its owner's agent (shared memory);
                   agents send to the owner; the owner reduces what the hosts sent, in the order of the hosts
    gather_parts   owners send to their agents; the ranks of each host gather what they hold (shared memory)

Bytes are in docs/several_hosts.md. gloo only moves them: all arithmetic is pycomm's own, in a fixed order, the ranks of
a host in rank order, then the hosts in the order of their lowest rank. 16-bit floats are sums of fp32 until their
owner rounds them once; where no two ranks share a host there are no sums to send, and they travel as they are.

Ref: "Optimization of Collective Communication Operations in MPICH" (2005), for reduce-scatter followed by all-gather.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pycomm import _C
from pycomm.arguments import dtype_name
from pycomm.backends.gloo.local import LocalGroup
from pycomm.backends.gloo.topology import Part, Topology, even_parts, in_agents_order, parts_of
from pycomm.backends.gloo.wire import Wire, WireError
from pycomm.errors import MismatchError, PycommError

__all__ = ["Limit", "Steps"]

# A step inside a host waits longer than one between hosts, so that the rank that misses another host says so first.
_SLACK_S = 3.0
_SCAN_BYTES = 1 << 20  # of every rank, gathered at once
_HALF_NAN = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}  # docs/determinism.md

Transfer = tuple[torch.Tensor, int]  # a flat tensor, and the rank at its other end


@dataclass
class Limit:
    """How long a call may wait: once for the ranks of this host to enter it, then for every step."""

    timeout_s: float
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    @property
    def local_s(self) -> float:
        return self.timeout_s + _SLACK_S

    @property
    def left_s(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def restart(self) -> None:
        self.deadline = time.monotonic() + self.timeout_s


class Steps:
    """The collectives of one group, on one of its ranks. Tensors are flat; all ranks call the same."""

    def __init__(self, topology: Topology, local: LocalGroup, wire: Wire | None) -> None:
        self._topology = topology
        self._local = local
        self._wire = wire
        self.missing: tuple[int, ...] = ()  # the rank of another host that a step waits for

    def run(self, call: _C.Call, output: torch.Tensor | None, input: torch.Tensor | None, limit: Limit) -> None:
        """Do ``call``, which all ranks have entered."""
        root, op = call.root, call.op
        if call.kind == "gather":
            assert input is not None
            self.gather(output, input, root, limit)
        elif call.kind == "scatter":
            assert output is not None
            self.scatter(output, input, root, limit)
        elif output is not None and input is not None:  # all but a barrier, which is over
            if call.kind == "all_reduce":
                self.all_reduce(_numbers(output), op, limit)
            elif call.kind == "reduce":
                self.reduce(_numbers(output), root, op, limit)
            elif call.kind == "scan":
                self.scan(_numbers(output), op, limit)
            elif call.kind == "broadcast":
                self.broadcast(output, root, limit)
            elif call.kind == "reduce_scatter":
                numbers = 2 if input.is_complex() else 1
                parts = parts_of([count * numbers for count in call.input_counts])
                mine = self.reduce_parts(_numbers(input), parts, op, limit)
                assert mine is not None  # every rank owns one
                _numbers(output).copy_(mine)
            elif call.kind == "all_gather":
                self.gather_parts(output, parts_of(call.output_counts), input, limit)
            else:
                assert call.kind == "all_to_all"
                if call.by_splits:
                    self.check_pairs(call.input_counts, call.output_counts, limit)
                self.all_to_all(output, input, call.output_counts, call.input_counts, limit)

    def table(self, row: bytes, limit: Limit) -> list[bytes]:
        """Every rank's ``row``, by rank; rows are equally long. The first ranks of the hosts exchange their hosts'."""
        topology, size = self._topology, len(row)
        order = [rank for ranks in topology.hosts for rank in ranks]
        rows = torch.empty(len(order), size, dtype=torch.uint8, device="cpu")
        blocks = list(rows.split([len(ranks) for ranks in topology.hosts]))
        mine = torch.frombuffer(bytearray(row), dtype=torch.uint8)
        if self._local.size == 1:
            blocks[topology.host].copy_(mine)
        else:
            counts = [size] * self._local.size
            self._local.all_gather(blocks[topology.host].view(-1), mine, counts, limit.timeout_s)
        limit.restart()
        if topology.local_rank == 0:
            others = [h for h in range(len(topology.hosts)) if h != topology.host]
            leader = [ranks[0] for ranks in topology.hosts]
            try:
                self.exchange(
                    [(blocks[topology.host], leader[h]) for h in others],
                    [(blocks[h], leader[h]) for h in others],
                    limit,
                )
            except WireError as error:
                if error.expired:  # somebody on that host has not come
                    error.silent = topology.hosts[topology.host_of[error.rank]]
                raise
        if self._local.size > 1 and len(topology.hosts) > 1:
            self._local.broadcast(rows.view(-1), 0, limit.local_s)
        by_rank = dict(zip(order, rows.numpy(), strict=True))
        return [by_rank[rank].tobytes() for rank in range(len(order))]

    def check_pairs(self, sent: Sequence[int], received: Sequence[int], limit: Limit) -> None:
        """MismatchError on every rank unless what each rank sends to each other is what that one receives."""
        size = len(sent)
        form = struct.Struct(f"<{2 * size}q")
        rows = [form.unpack(row) for row in self.table(form.pack(*sent, *received), limit)]
        for src in range(size):
            for dst in range(size):
                if rows[src][dst] != rows[dst][size + src]:
                    out, into = (
                        f"sends {rows[src][dst]} to rank {dst}",
                        f"takes {rows[dst][size + src]} from rank {src}",
                    )
                    raise MismatchError(
                        f"all_to_all by splits: rank {src} {out}, rank {dst} {into} (elements)",
                        calls={src: f"all_to_all: {out}", dst: f"all_to_all: {into}"},
                    )

    def exchange(self, sends: Sequence[Transfer], receives: Sequence[Transfer], limit: Limit) -> None:
        """Send and receive, all at once; those of a pair of ranks match in order, and are equally long."""
        topology = self._topology
        sends = [(tensor, rank) for tensor, rank in sends if tensor.numel()]
        receives = [(tensor, rank) for tensor, rank in receives if tensor.numel()]
        works = []
        try:
            for tensor, rank in receives:
                if not topology.is_here(rank):
                    works.append((self._remote.receive(tensor, rank), rank))
            for tensor, rank in sends:
                if not topology.is_here(rank):
                    works.append((self._remote.send(tensor, rank), rank))
            here = [
                [(tensor, topology.local_of[rank]) for tensor, rank in side if topology.is_here(rank)]
                for side in (sends, receives)
            ]
            if any(here):
                self._local.exchange(here[0], here[1], limit.local_s)
            for work, rank in works:
                self.missing = (rank,)
                self._remote.wait(work, rank, limit.deadline)
            self.missing = ()
        except (WireError, PycommError):
            if works:
                self._remote.cut()  # before the tensors are freed
            raise

    def reduce_parts(self, source: torch.Tensor, parts: Sequence[Part], op: str, limit: Limit) -> torch.Tensor | None:
        """Reduce ``source`` over all ranks; returns this rank's own part of it, or None if it has none.

        Args:
            source: [N], only read. The parts cover it in order; a rank owns one at most.
        """
        topology, local = self._topology, self._local
        dtype = source.dtype
        if not topology.flat and dtype in _HALF_NAN:
            source = source.float()
        groups = in_agents_order(topology, parts)
        ordered = [part for group in groups for part in group]
        if ordered != list(parts):
            source = torch.cat([source[part.begin : part.begin + part.count] for part in ordered])
        counts = [sum(part.count for part in group) for group in groups]
        whole_op = "sum" if op == "avg" and not topology.flat else op
        held = source
        if local.size > 1:
            held = source.new_empty(counts[topology.local_rank])
            local.reduce_scatter(held, source, counts, whole_op, limit.local_s)
        pieces = held.split([part.count for part in groups[topology.local_rank]])
        mine, sends = None, []
        for part, piece in zip(groups[topology.local_rank], pieces, strict=True):
            if part.owner == topology.rank:
                mine = piece
            else:
                sends.append((piece, part.owner))
        by_host = [] if mine is None else [torch.empty_like(mine) for _ in topology.hosts]
        receives = [(piece, topology.agent(h, topology.rank)) for h, piece in enumerate(by_host) if h != topology.host]
        self.exchange(sends, receives, limit)
        if mine is None:
            return None
        by_host[topology.host] = mine
        result = torch.empty_like(mine)
        addresses = [piece.data_ptr() for piece in by_host]
        if mine.numel():
            _C.reduce(dtype_name(mine.dtype), whole_op, addresses, [result.data_ptr()], mine.numel())
        if whole_op != op:
            result.div_(topology.world_size)
        return result if dtype == result.dtype else _rounded(result, dtype)

    def gather_parts(
        self, output: torch.Tensor, parts: Sequence[Part], mine: torch.Tensor | None, limit: Limit
    ) -> None:
        """Leave all parts in everyone's ``output``, [N], which they cover in order.

        Args:
            mine: this rank's own part, elsewhere or in its place in ``output``; None if it has none.
        """
        topology = self._topology
        groups = in_agents_order(topology, parts)
        ordered = [part for group in groups for part in group]
        in_place = ordered == list(parts)
        buffer = output if in_place else torch.empty_like(output)
        places = dict(zip(ordered, buffer.split([part.count for part in ordered]), strict=True))
        held = groups[topology.local_rank]
        receives = [(places[part], part.owner) for part in held if part.owner != topology.rank]
        sends = []
        if mine is not None:
            (place,) = (places[part] for part in held if part.owner == topology.rank)
            if place.data_ptr() != mine.data_ptr():
                place.copy_(mine)
            others = [h for h in range(len(topology.hosts)) if h != topology.host]
            sends = [(mine, topology.agent(h, topology.rank)) for h in others]
        self.exchange(sends, receives, limit)
        if self._local.size > 1:
            counts = [sum(part.count for part in group) for group in groups]
            begin = sum(counts[: topology.local_rank])
            own = buffer[begin : begin + counts[topology.local_rank]]
            self._local.all_gather(buffer, own, counts, limit.local_s)
        if not in_place:
            for part in parts:
                output[part.begin : part.begin + part.count].copy_(places[part])

    def all_reduce(self, tensor: torch.Tensor, op: str, limit: Limit) -> None:
        parts = even_parts(tensor.numel(), self._topology.rails())
        mine = self.reduce_parts(tensor, parts, op, limit)
        self.gather_parts(tensor, parts, mine, limit)

    def reduce(self, tensor: torch.Tensor, root: int, op: str, limit: Limit) -> None:
        """As all_reduce, but owners send to the root."""
        parts = even_parts(tensor.numel(), self._topology.rails())
        mine = self.reduce_parts(tensor, parts, op, limit)
        self._to_root(tensor, parts, mine, root, limit)

    def scan(self, tensor: torch.Tensor, op: str, limit: Limit) -> None:
        """Gather slices of all, and reduce those of the ranks up to this one, in rank order."""
        size, rank = self._topology.world_size, self._topology.rank
        for mine in tensor.split(_SCAN_BYTES // tensor.element_size()):
            count = mine.numel()
            gathered = mine.new_empty(size * count)
            self.gather_parts(gathered, parts_of([count] * size), mine, limit)
            pieces = [piece.data_ptr() for piece in gathered.split(count)[: rank + 1]]
            _C.reduce(dtype_name(mine.dtype), op, pieces, [mine.data_ptr()], count)

    def broadcast(self, tensor: torch.Tensor, root: int, limit: Limit) -> None:
        """The root sends each part to its owner; then they are gathered."""
        parts = even_parts(tensor.numel(), self._topology.rails())
        places = dict(zip(parts, tensor.split([part.count for part in parts]), strict=True))
        mine = next((places[part] for part in parts if part.owner == self._topology.rank), None)
        if self._topology.rank == root:
            self.exchange([(places[part], part.owner) for part in parts if part.owner != root], [], limit)
        elif mine is not None:
            self.exchange([], [(mine, root)], limit)
        self.gather_parts(tensor, parts, mine, limit)

    def gather(self, output: torch.Tensor | None, input: torch.Tensor, root: int, limit: Limit) -> None:
        """All send to the root at once."""
        whole = torch.empty(0, device="cpu") if output is None else output
        parts = [Part(rank, rank * input.numel(), input.numel()) for rank in range(self._topology.world_size)]
        self._to_root(whole, parts, input, root, limit)

    def scatter(self, output: torch.Tensor, input: torch.Tensor | None, root: int, limit: Limit) -> None:
        """The root sends to all at once."""
        if input is None:
            self.exchange([], [(output, root)], limit)
            return
        parts = input.split(output.numel()) if output.numel() else [output] * self._topology.world_size
        self.exchange([(part, rank) for rank, part in enumerate(parts) if rank != root], [], limit)
        _copy(output, parts[root])

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_counts: Sequence[int],
        input_counts: Sequence[int],
        limit: Limit,
    ) -> None:
        """All pairs at once."""
        rank = self._topology.rank
        sends = list(zip(input.split(list(input_counts)), range(self._topology.world_size), strict=True))
        receives = list(zip(output.split(list(output_counts)), range(self._topology.world_size), strict=True))
        _copy(receives.pop(rank)[0], sends.pop(rank)[0])
        self.exchange(sends, receives, limit)

    def _to_root(
        self, whole: torch.Tensor, parts: Sequence[Part], mine: torch.Tensor | None, root: int, limit: Limit
    ) -> None:
        """Leave all parts in ``whole`` of the root; ``mine``: this rank's own, if it has one."""
        if self._topology.rank != root:
            self.exchange([] if mine is None else [(mine, root)], [], limit)
            return
        places = [(whole[part.begin : part.begin + part.count], part.owner) for part in parts]
        self.exchange([], [(place, owner) for place, owner in places if owner != root], limit)
        for place, owner in places:
            if owner == root and mine is not None:
                _copy(place, mine)

    @property
    def _remote(self) -> Wire:
        assert self._wire is not None  # there are other hosts
        return self._wire


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What is reduced: complex numbers are pairs of real ones, whose sums have the rules of real ones."""
    return torch.view_as_real(tensor).view(-1) if tensor.is_complex() else tensor


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 to 16 bits, to nearest even; every NaN is the one of the host transport, which torch's need not be."""
    rounded = values.to(dtype)
    rounded.view(torch.int16).masked_fill_(values.isnan(), _HALF_NAN[dtype])
    return rounded


def _copy(output: torch.Tensor, input: torch.Tensor) -> None:
    if output.data_ptr() != input.data_ptr():
        output.copy_(input)
