"""The collectives of the process group: c10d's method names and options on one side, a communicator on the other.

Names come in families, since torch renamed some: ``all_gather_single`` and ``_allgather_base`` are one method. Options
say whether the caller goes on at once (``asyncOp``); if not, the call runs in the caller's thread, which saves the way
through the progress thread, and returns a Work that is over.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import ReduceOp

from pycomm import _C
from pycomm.communicator import Communicator
from pycomm.torch_backend import seconds_of
from pycomm.torch_backend.communicators import Communicators
from pycomm.torch_backend.tensors import (
    Finish,
    combine,
    kind_of,
    landing,
    operator,
    reduced,
    source,
    spread,
    together,
)
from pycomm.torch_backend.work import PycommWork

__all__ = ["Collectives"]

Tensors = list[torch.Tensor]


class Collectives(dist.ProcessGroup):
    """Everything that all ranks of a group call together.

    Tensors may have any strides: what is not contiguous goes through memory that is. Ranks count within the group. The
    tensors of a call are on one device, and decide which communicator it goes to.
    """

    _communicators: Communicators
    _timeout_s: float

    def allreduce(self, tensors: Tensors, opts: c10d.AllreduceOptions | None = None) -> PycommWork:
        opts = opts or c10d.AllreduceOptions()
        return self._all_reduce(_only(tensors), opts.reduceOp, opts)

    def allreduce_coalesced(self, tensors: Tensors, opts: c10d.AllreduceCoalescedOptions | None = None) -> PycommWork:
        opts = opts or c10d.AllreduceCoalescedOptions()
        return self._joined([self._all_reduce(tensor, opts.reduceOp, opts) for tensor in tensors])

    def _all_reduce(self, tensor: torch.Tensor, op: ReduceOp, opts: Any) -> PycommWork:
        name = operator(op, tensor.dtype)
        if name is None:
            return self._bitwise(tensor, op, opts)
        comm = self._communicators.of(tensor)
        wire, finish = reduced(tensor, op)
        started = comm.all_reduce(wire, name, async_op=opts.asyncOp, timeout_s=self._timeout(opts))
        return self._work(comm, started, [tensor], finish)

    def reduce(self, tensors: Tensors, opts: c10d.ReduceOptions | None = None) -> PycommWork:
        opts = opts or c10d.ReduceOptions()
        tensor, op = _only(tensors), opts.reduceOp
        comm = self._communicators.of(tensor)
        is_root = opts.rootRank == comm.rank
        name = operator(op, tensor.dtype)
        if name is None:
            return self._bitwise(tensor, op, opts, writes=is_root)
        wire, finish = reduced(tensor, op)
        started = comm.reduce(wire, opts.rootRank, name, async_op=opts.asyncOp, timeout_s=self._timeout(opts))
        return self._work(comm, started, [tensor], finish if is_root else None)

    def _bitwise(self, tensor: torch.Tensor, op: ReduceOp, opts: Any, writes: bool = True) -> PycommWork:
        """What communicators do not reduce: every rank gathers all contributions and combines them."""
        comm = self._communicators.of(tensor)
        parts = torch.empty((comm.world_size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        finish = partial(combine, tensor, parts, op) if writes else None
        started = comm.all_gather(source(parts), source(tensor), async_op=opts.asyncOp, timeout_s=self._timeout(opts))
        return self._work(comm, started, [tensor], finish)

    def broadcast(self, tensors: Tensors, opts: c10d.BroadcastOptions | None = None) -> PycommWork:
        opts = opts or c10d.BroadcastOptions()
        tensor = _only(tensors)
        comm = self._communicators.of(tensor)
        wire, finish = landing(tensor)
        started = comm.broadcast(wire, opts.rootRank, async_op=opts.asyncOp, timeout_s=self._timeout(opts))
        return self._work(comm, started, [tensor], finish if opts.rootRank != comm.rank else None)

    def reduce_scatter(
        self, outputs: Tensors, inputs: list[Tensors], opts: c10d.ReduceScatterOptions | None = None
    ) -> PycommWork:
        opts = opts or c10d.ReduceScatterOptions()
        parts, num_ranks = _only(inputs), self._communicators.host.world_size
        if len(parts) != num_ranks:
            raise ValueError(f"reduce_scatter: {len(parts)} inputs for {num_ranks} ranks")
        return self._reduce_scatter(_only(outputs), *together(parts), opts)

    def reduce_scatter_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: c10d.ReduceScatterOptions | None = None
    ) -> PycommWork:
        return self._reduce_scatter(output, input, None, opts or c10d.ReduceScatterOptions())

    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: c10d.ReduceScatterOptions | None = None
    ) -> PycommWork:
        opts = opts or c10d.ReduceScatterOptions()
        return self._joined(
            [self._reduce_scatter(output, input, None, opts) for output, input in zip(outputs, inputs, strict=True)]
        )

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    def _reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, splits: list[int] | None, opts: c10d.ReduceScatterOptions
    ) -> PycommWork:
        op = opts.reduceOp
        name = operator(op, input.dtype)
        if name is None:
            raise ValueError(f"reduce_scatter: ReduceOp.{kind_of(op).name} is not supported; use all_reduce")
        comm = self._communicators.of(input)
        contributions, _ = reduced(input, op)  # what it multiplies or lays out, it does in memory of its own
        wire, finish = reduced(output, _SUM)
        started = comm.reduce_scatter(
            wire, contributions, name, splits, async_op=opts.asyncOp, timeout_s=self._timeout(opts)
        )
        return self._work(comm, started, [output], finish)

    def allgather(
        self, outputs: list[Tensors], inputs: Tensors, opts: c10d.AllgatherOptions | None = None
    ) -> PycommWork:
        """The outputs of different ranks may differ in size."""
        opts = opts or c10d.AllgatherOptions()
        parts, input = _only(outputs), _only(inputs)
        comm = self._communicators.of(input)
        arriving, counts, finish = spread(parts)
        started = comm.all_gather(arriving, source(input), counts, async_op=opts.asyncOp, timeout_s=self._timeout(opts))
        return self._work(comm, started, parts, finish)

    def all_gather_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: c10d.AllgatherOptions | None = None
    ) -> PycommWork:
        opts = opts or c10d.AllgatherOptions()
        comm = self._communicators.of(input)
        wire, finish = landing(output)
        started = comm.all_gather(wire, source(input), async_op=opts.asyncOp, timeout_s=self._timeout(opts))
        return self._work(comm, started, [output], finish)

    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: c10d.AllgatherOptions | None = None
    ) -> PycommWork:
        return self._joined(
            [self.all_gather_single(output, input, opts) for output, input in zip(outputs, inputs, strict=True)]
        )

    def allgather_coalesced(
        self, outputs: list[Tensors], inputs: Tensors, opts: c10d.AllgatherOptions | None = None
    ) -> PycommWork:
        """``outputs[rank][i]`` is ``inputs[i]`` of that rank."""
        return self._joined(
            [
                self.allgather([[tensors[index] for tensors in outputs]], [input], opts)
                for index, input in enumerate(inputs)
            ]
        )

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: c10d.GatherOptions | None = None) -> PycommWork:
        opts = opts or c10d.GatherOptions()
        parts, finish, arriving, input = [], None, None, _only(inputs)
        comm = self._communicators.of(input)
        if opts.rootRank == comm.rank:
            parts = _only(outputs)
            arriving, _, finish = spread(parts)
        started = comm.gather(
            arriving, source(input), opts.rootRank, async_op=opts.asyncOp, timeout_s=self._timeout(opts)
        )
        return self._work(comm, started, parts, finish)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: c10d.ScatterOptions | None = None) -> PycommWork:
        opts = opts or c10d.ScatterOptions()
        output = _only(outputs)
        comm = self._communicators.of(output)
        wire, finish = landing(output)
        leaving = together(_only(inputs))[0] if opts.rootRank == comm.rank else None
        started = comm.scatter(wire, leaving, opts.rootRank, async_op=opts.asyncOp, timeout_s=self._timeout(opts))
        return self._work(comm, started, [output], finish)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: c10d.AllToAllOptions | None = None) -> PycommWork:
        """Sizes may differ from pair to pair."""
        opts = opts or c10d.AllToAllOptions()
        comm = self._communicators.of(inputs[0])
        arriving, output_counts, finish = spread(outputs)
        leaving, input_counts = together(inputs)
        started = comm.all_to_all(
            arriving,
            leaving,
            output_counts,
            input_counts,
            async_op=opts.asyncOp,
            timeout_s=self._timeout(opts),
        )
        return self._work(comm, started, outputs, finish)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: c10d.AllToAllOptions | None = None,
    ) -> PycommWork:
        """Splits are rows; empty: equal parts, which is each rank's own business, so splits go along always."""
        opts = opts or c10d.AllToAllOptions()
        comm = self._communicators.of(input)
        wire, finish = landing(output)
        started = comm.all_to_all(
            wire,
            source(input),
            output_splits or _even(output, comm.world_size, "output"),
            input_splits or _even(input, comm.world_size, "input"),
            async_op=opts.asyncOp,
            timeout_s=self._timeout(opts),
        )
        return self._work(comm, started, [output], finish)

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def barrier(self, opts: c10d.BarrierOptions | None = None) -> PycommWork:
        """On the host, unless torch names a GPU: the one given to ``init_process_group``, or in ``device_ids``."""
        opts = opts or c10d.BarrierOptions()
        comm = self._communicators.host if opts.device is None else self._communicators.on(opts.device)
        started = comm.barrier(async_op=opts.asyncOp, timeout_s=self._timeout(opts))
        return self._work(comm, started, [], None)

    def _timeout(self, opts: Any) -> float:
        seconds = seconds_of(opts.timeout)
        return seconds if seconds > 0 else self._timeout_s  # torch's "unset" is negative

    def _work(self, comm: Communicator, started: _C.Work | None, outputs: Tensors, finish: Finish) -> PycommWork:
        """The Work of a call of ``comm`` that has started, or of a synchronous one (None)."""
        raise NotImplementedError

    def _joined(self, works: list[PycommWork]) -> PycommWork:
        """One Work for calls that were issued one after the other."""
        raise NotImplementedError


_SUM = ReduceOp(ReduceOp.SUM)


def _only(values: Any) -> Any:
    """The one element of a list, which some callers leave out."""
    if isinstance(values, torch.Tensor):
        return values
    if len(values) != 1:
        raise ValueError(f"{len(values)} tensors in one call: the back end pycomm takes one a process")
    return values[0]


def _even(tensor: torch.Tensor, world_size: int, name: str) -> list[int]:
    rows = tensor.shape[0] if tensor.dim() else 1
    if rows % world_size:
        raise ValueError(f"all_to_all_single: {rows} rows of {name} for {world_size} ranks: pass {name}_split_sizes")
    return [rows // world_size] * world_size
