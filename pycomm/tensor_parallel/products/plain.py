"""Products by collectives, on any back end: multiply, then reduce, or gather, then multiply.

Where ranks share a host's memory, the communication is the work of their cores, and steps follow each other: nothing
else can run meanwhile. Everywhere else, with ``overlap``, the collectives are asynchronous: own rows are multiplied
while the others' arrive, and in backward the weight's gradient is computed while that of x is summed.

Rows of several sequences travel *by rank*: [B, S, K] as [B * S, K], first the rows of all sequences that are rank 0's.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm.communicator import Communicator, Work
from pycomm.errors import MismatchError
from pycomm.tensor_parallel.products.protocol import Gradients
from pycomm.tensor_parallel.shards import shard_sizes, start_of

__all__ = [
    "ALL_REDUCE",
    "GATHER",
    "REDUCE_SCATTER",
    "Agreed",
    "Gathered",
    "PlainProducts",
    "as_3d",
    "by_rank",
    "empty_by_rank",
    "put_in_order",
]

GATHER, REDUCE_SCATTER, ALL_REDUCE = range(3)
_CALLS = ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NOT_TRACED = nullcontext()
_log = logging.getLogger("pycomm")


class Agreed(NamedTuple):
    """What all ranks have shown each other that they call.

    Attributes:
        sizes: of dim −2 of x, by rank.
        in_features, out_features: the most of any rank; 0: a rank has none.
    """

    sizes: list[int]
    in_features: int
    out_features: int


class Gathered(NamedTuple):
    """Rows of all ranks.

    Attributes:
        sizes: of dim −2, by rank.
        whole: waits for the rows and returns them, [B * S, K] by rank; call it on the stream of the product.
    """

    sizes: list[int]
    whole: Callable[[], Tensor]


class PlainProducts:
    """See :class:`pycomm.tensor_parallel.products.Products`; a communicator owns it, so it refers to that weakly."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = weakref.ref(comm)
        shares_memory = comm.capabilities.has_flags
        self._compares = shares_memory  # elsewhere that costs a round trip, and only gathering needs it
        self._concurrent = comm.world_size > 1 and not shares_memory
        if shares_memory and comm.world_size > 1:
            _log.info(
                "products of group %r: collectives on shared memory, one step after the other whatever overlap says: "
                "a core computes or communicates",
                comm.name,
            )

    @property
    def comm(self) -> Communicator:
        comm = self._comm()
        assert comm is not None  # it owns this object
        return comm

    def all_gather_matmul(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int] | None, overlap: bool
    ) -> Tensor:
        return self._gather_matmul(x, weight.t(), bias, sizes, overlap)[0]

    def all_gather_matmul_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        sizes: Sequence[int] | None,
        overlap: bool,
        need_x: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> Gradients:
        grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
        gathered: Gathered | None = None
        if need_weight:
            gathered = self._gather(x, sizes, overlap)
            sizes = gathered.sizes
        elif need_x and sizes is None:
            sizes = self._agree(GATHER, x, x.shape[-1], weight.shape[0]).sizes

        def weight_gradient() -> None:
            nonlocal grad_weight
            if gathered is not None:
                grad_weight = by_rank(as_3d(grad), gathered.sizes).t() @ gathered.whole()

        if need_x:
            assert sizes is not None
            grad_x = self._reduce_scatter(grad, weight, None, sizes, overlap, weight_gradient if need_weight else None)
        else:
            weight_gradient()
        return grad_x, grad_weight, _sum_of_rows(grad, need_bias)

    def matmul_reduce_scatter(self, x: Tensor, weight: Tensor, bias: Tensor | None, overlap: bool) -> Tensor:
        return self._reduce_scatter(x, weight.t(), bias, shard_sizes(x.shape[-2], self.comm.world_size), overlap)

    def matmul_reduce_scatter_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, overlap: bool, need_x: bool, need_weight: bool, need_bias: bool
    ) -> Gradients:
        sizes = shard_sizes(x.shape[-2], self.comm.world_size)
        grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
        if need_x:
            grad_x, gathered = self._gather_matmul(grad, weight, None, sizes, overlap)
        elif need_weight or need_bias:
            gathered = self._gather(grad, sizes, overlap)
        grad_bias = weight.new_empty(0)
        if need_weight or need_bias:
            whole = gathered.whole()
            grad_weight = whole.t() @ by_rank(as_3d(x), sizes) if need_weight else grad_weight
            grad_bias = whole.sum(0) if need_bias else grad_bias
        return grad_x, grad_weight, grad_bias

    def matmul_all_reduce(self, x: Tensor, weight: Tensor, bias: Tensor | None, overlap: bool) -> Tensor:
        return self._all_reduce(x, weight.t(), bias, overlap)

    def matmul_all_reduce_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, overlap: bool, need_x: bool, need_weight: bool, need_bias: bool
    ) -> Gradients:
        grad_x = grad @ weight if need_x else x.new_empty(0)
        return grad_x, _weight_gradient(grad, x, need_weight), _sum_of_rows(grad, need_bias)

    def copy_matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None, overlap: bool) -> Tensor:
        return F.linear(x, weight, bias)

    def copy_matmul_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, overlap: bool, need_x: bool, need_weight: bool, need_bias: bool
    ) -> Gradients:
        grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)

        def weight_gradient() -> None:
            nonlocal grad_weight
            grad_weight = _weight_gradient(grad, x, need_weight)

        if need_x:
            grad_x = self._all_reduce(grad, weight, None, overlap, weight_gradient if need_weight else None)
        else:
            weight_gradient()
        return grad_x, grad_weight, _sum_of_rows(grad, need_bias)

    # What these are made of; of weights as [K, N]

    def _gather(self, x: Tensor, sizes: Sequence[int] | None, overlap: bool) -> Gathered:
        """All ranks' rows of x […, s, K]."""
        shard = as_3d(x)
        batch, _, width = shard.shape
        found = self._agree(GATHER, x, width, 0, sizes).sizes
        flat = x.new_empty(batch * sum(found), width)
        rows = [batch * size for size in found]
        with span("pycomm::gather"):
            work = self.comm.all_gather(
                flat, shard.contiguous(), output_splits=rows, async_op=overlap and self._concurrent
            )

        def whole() -> Tensor:
            _wait(work)
            return flat

        return Gathered(found, whole)

    def _gather_matmul(
        self, x: Tensor, weight_t: Tensor, bias: Tensor | None, sizes: Sequence[int] | None, overlap: bool
    ) -> tuple[Tensor, Gathered]:
        """``cat(x over ranks) @ weight_t + bias`` of x […, s, K], and what was gathered."""
        gathered = self._gather(x, sizes, overlap)
        shard = as_3d(x)
        batch, rows, _ = shard.shape
        out, flat = empty_by_rank(x, gathered.sizes, weight_t.shape[1])
        if self._concurrent:
            start = batch * start_of(gathered.sizes, self.comm.rank)
            end = start + batch * rows
            _multiply(shard.flatten(0, 1), weight_t, bias, flat[start:end])
            whole = gathered.whole()
            for others in (slice(0, start), slice(end, None)):
                _multiply(whole[others], weight_t, bias, flat[others])
        else:
            _multiply(gathered.whole(), weight_t, bias, flat)
        return put_in_order(flat, gathered.sizes, out), gathered

    def _reduce_scatter(
        self,
        x: Tensor,
        weight_t: Tensor,
        bias: Tensor | None,
        sizes: Sequence[int],
        overlap: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """This rank's rows of ``x @ weight_t`` summed over ranks, ``+ bias``. x is […, S, K].

        Args:
            sizes: of S, by rank.
            meanwhile: called once, while the sum is under way if ``overlap``, or after it.
        """
        shard, width = as_3d(x), weight_t.shape[1]
        partial = x.new_empty(shard.shape[0] * shard.shape[1], width)
        _multiply(by_rank(shard, sizes), weight_t, bias if self.comm.rank == 0 else None, partial)
        if self._compares:
            self._agree(REDUCE_SCATTER, x, x.shape[-1], width)
        out = x.new_empty(*x.shape[:-2], sizes[self.comm.rank], width)
        rows = [shard.shape[0] * size for size in sizes]
        self._sum(functools.partial(self.comm.reduce_scatter, out, partial, input_splits=rows), overlap, meanwhile)
        return out

    def _all_reduce(
        self,
        x: Tensor,
        weight_t: Tensor,
        bias: Tensor | None,
        overlap: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """``x @ weight_t`` summed over ranks, ``+ bias``. ``meanwhile`` as of :meth:`_reduce_scatter`."""
        width = weight_t.shape[1]
        out = x.new_empty(*x.shape[:-1], width)
        _multiply(x.flatten(0, -2), weight_t, bias if self.comm.rank == 0 else None, out.flatten(0, -2))
        if self._compares:
            self._agree(ALL_REDUCE, x.flatten(0, -2), x.shape[-1], width)
        self._sum(functools.partial(self.comm.all_reduce, out), overlap, meanwhile)
        return out

    def _sum(self, start: Callable[..., Work | None], overlap: bool, meanwhile: Callable[[], None] | None) -> None:
        with span("pycomm::sum"):
            work = start(async_op=overlap and self._concurrent)
        if meanwhile is not None:
            meanwhile()
        _wait(work)

    def _agree(
        self, kind: int, x: Tensor, in_features: int, out_features: int, sizes: Sequence[int] | None = None
    ) -> Agreed:
        """Show all ranks what this one calls, and see what they call; the host waits for them.

        Args:
            x: […, S, K] of the call.
            sizes: rows that the caller expects of the ranks.

        Raises:
            MismatchError: ranks call different things; on every rank, and the communicator stays usable.
            ValueError: the ranks have other rows.
        """
        if x.dtype not in _DTYPES:
            raise ValueError(f"products over ranks take float32, float64, float16 and bfloat16, not {x.dtype}")
        width = in_features if kind == GATHER else out_features
        batch, rows, _ = as_3d(x).shape
        mine = [kind, _DTYPES.index(x.dtype), batch, rows, width, in_features, out_features]
        with span("pycomm::wait"):
            found = self.comm.agree(mine) if self.comm.world_size > 1 else [mine]
        if len({(*row[:3], None if row[0] == GATHER else row[3], row[4]) for row in found}) > 1:
            calls = {rank: _describe(*row[:5]) for rank, row in enumerate(found)}
            text = "; ".join(f"rank {rank} {call}" for rank, call in calls.items())
            raise MismatchError(f"ranks of group {self.comm.name!r} called different things: {text}", calls=calls)
        have = [row[3] for row in found]
        if sizes is not None and have != list(sizes):
            raise ValueError(f"the ranks have {have} rows, expected {list(sizes)}: pass the sizes that they have")
        features = [[row[place] for row in found] for place in (5, 6)]
        most = [max(counts) if min(counts) > 0 else 0 for counts in features]
        return Agreed(have, *most)


def _describe(kind: int, dtype: int, batch: int, rows: int, width: int) -> str:
    return f"{_CALLS[kind]}({str(_DTYPES[dtype]).removeprefix('torch.')}[{batch}, {rows}, {width}])"


def as_3d(x: Tensor) -> Tensor:
    """[…, S, K] as [B, S, K]; [S, K] as [1, S, K]."""
    return x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3) if x.dim() > 3 else x


def by_rank(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[B, S, K] as contiguous [B * S, K]: first the rows of all sequences that are rank 0's."""
    if x.shape[0] == 1:
        return x[0].contiguous()
    return torch.cat([part.flatten(0, 1) for part in x.split(list(sizes), 1)])


def empty_by_rank(x: Tensor, sizes: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """A result […, S, N] for x […, s, K], and memory for it by rank, [B * S, N]: the same where B is 1."""
    out = x.new_empty(*x.shape[:-2], sum(sizes), width)
    flat = out.flatten(0, -2) if _batch_of(x) == 1 else x.new_empty(_batch_of(x) * sum(sizes), width)
    return out, flat


def put_in_order(flat: Tensor, sizes: Sequence[int], out: Tensor) -> Tensor:
    """Fill the first of :func:`empty_by_rank` from the second."""
    batch, width = _batch_of(out), flat.shape[1]
    if batch != 1 and out.numel():
        blocks = zip(flat.split([batch * size for size in sizes]), sizes, strict=True)
        torch.cat([block.view(batch, size, width) for block, size in blocks], 1, out=as_3d(out))
    return out


def _batch_of(x: Tensor) -> int:
    return x.shape[:-2].numel()


def span(name: str) -> AbstractContextManager[object]:
    """A span of that name in the traces of torch.profiler; costs next to nothing while there is none."""
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else _NOT_TRACED


def _wait(work: Work | None) -> None:
    if work is not None:
        with span("pycomm::wait"):
            work.wait()


def _multiply(x: Tensor, weight_t: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight_t, out=out)
    else:
        torch.addmm(bias, x, weight_t, out=out)


def _weight_gradient(grad: Tensor, x: Tensor, wanted: bool) -> Tensor:
    return grad.flatten(0, -2).t() @ x.flatten(0, -2) if wanted else x.new_empty(0)


def _sum_of_rows(grad: Tensor, wanted: bool) -> Tensor:
    return grad.flatten(0, -2).sum(0) if wanted else grad.new_empty(0)
