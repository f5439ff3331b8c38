"""Overlapped products on GPUs that map each other's memory: ``pycomm.gpu.OverlappedMatmuls``.

Rows move by copy engine while cuBLASLt multiplies, and partial products are added in rank order, 16-bit ones in fp32
with one rounding (csrc/cuda/matmul/plan.hpp has the steps). Weights are read as they lie. Without ``overlap`` the same
steps run one after the other, so the bits are the same.

Before a product is enqueued its ranks show each other, over the host, what they call. So a rank that does not come is
named before anything waits for it on the device, everyone's rows are known without a look at the GPU, and all ranks
find together that a workspace has to grow, or that a rank has no features and the call goes by collectives.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.errors import PycommError
from pycomm.gpu import KernelRanks, OverlappedMatmuls, kernel_device
from pycomm.tensor_parallel.products.plain import (
    ALL_REDUCE,
    GATHER,
    REDUCE_SCATTER,
    Agreed,
    Gathered,
    PlainProducts,
    as_3d,
    by_rank,
    empty_by_rank,
    put_in_order,
)
from pycomm.tensor_parallel.shards import shard_sizes, start_of

__all__ = ["CudaProducts"]

_log = logging.getLogger("pycomm")
_RELEASE_S = 1e-3


class SideStream:
    """A stream for a product beside which the caller has other work for the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def behind_current(self) -> Iterator[None]:
        """It is current in the block, and starts behind what the current stream holds."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def rejoin(self) -> None:
        """What the current stream does from now on comes behind it."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Capacity(NamedTuple):
    """The most that overlapped products take.

    Attributes:
        rows: of all ranks together.
        rows_of_one: of any rank.
    """

    rows: int
    rows_of_one: int
    in_features: int
    out_features: int


class CudaProducts(PlainProducts):
    """See the module. Growing its workspaces, one a dtype, is collective.

    Args:
        ranks: the ranks of ``comm``, and their mapped memory.
    """

    def __init__(self, comm: Communicator, ranks: KernelRanks) -> None:
        super().__init__(comm)
        self._compares = True
        self._ranks = ranks
        self._side = SideStream(ranks.device)
        self._matmuls: dict[torch.dtype, tuple[OverlappedMatmuls, _Capacity]] = {}
        alive = weakref.ref(self)

        def release() -> None:
            found = alive()
            if found is not None:
                found._release()

        comm.when_it_fails(release)

    @classmethod
    def connect(cls, comm: Communicator) -> CudaProducts | None:
        """Map the ranks' memory: collective. Returns None, on all ranks alike, if it cannot be; the log says why."""
        host = comm.on_host()
        if host is None:
            _log.info("products of group %r: by collectives, since its ranks are on several hosts", comm.name)
            return None
        index = comm.device.index
        try:
            comm.all_or_none(lambda: kernel_device(index))  # what can fail on one rank alone: mapping needs all ranks
            ranks = comm.all_or_none(lambda: KernelRanks.processes(host, device=index))
        except PycommError as error:
            _log.info("products of group %r: by collectives on all ranks: %s", comm.name, error)
            return None
        return cls(comm, ranks)

    def _gather_matmul(
        self, x: Tensor, weight_t: Tensor, bias: Tensor | None, sizes: Sequence[int] | None, overlap: bool
    ) -> tuple[Tensor, Gathered]:
        shard, (in_features, out_features) = as_3d(x), weight_t.shape
        agreed = self._agree(GATHER, x, in_features, out_features, sizes)
        rows = [shard.shape[0] * size for size in agreed.sizes]
        matmuls = self._matmuls_for(x.dtype, rows, agreed)
        if matmuls is None:
            return super()._gather_matmul(x, weight_t, bias, sizes, overlap)
        out, by_rank_out = empty_by_rank(x, agreed.sizes, out_features)
        flat = shard.reshape(-1, in_features).contiguous()
        weight, transposed = _as_it_lies(weight_t)
        options = {"transposed": transposed, "one_by_one": not overlap, "outs": [by_rank_out]}
        matmuls.all_gather_matmul([flat], [weight], rows, **options)
        put_in_order(by_rank_out, agreed.sizes, out)

        def whole() -> Tensor:
            gathered = matmuls.gathered(rows, in_features)
            gathered[start_of(rows, self.comm.rank) :][: flat.shape[0]].copy_(flat)
            return gathered

        return out if bias is None else out.add_(bias), Gathered(agreed.sizes, whole)

    def _reduce_scatter(
        self,
        x: Tensor,
        weight_t: Tensor,
        bias: Tensor | None,
        sizes: Sequence[int],
        overlap: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        x_3d, (in_features, out_features) = as_3d(x), weight_t.shape
        rows = [x_3d.shape[0] * size for size in sizes]
        agreed = self._agree(REDUCE_SCATTER, x, in_features, out_features)
        matmuls = self._matmuls_for(x.dtype, rows, agreed)
        if matmuls is None:
            return super()._reduce_scatter(x, weight_t, bias, sizes, overlap, meanwhile)
        out = x.new_empty(*x.shape[:-2], sizes[self.comm.rank], out_features)
        self._enqueue(
            matmuls.matmul_reduce_scatter, by_rank(x_3d, sizes), weight_t, bias, rows, out, overlap, meanwhile
        )
        return out

    def _all_reduce(
        self,
        x: Tensor,
        weight_t: Tensor,
        bias: Tensor | None,
        overlap: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        flat, (in_features, out_features) = x.flatten(0, -2).contiguous(), weight_t.shape
        rows = shard_sizes(flat.shape[0], self.comm.world_size)
        agreed = self._agree(ALL_REDUCE, flat, in_features, out_features)
        matmuls = self._matmuls_for(x.dtype, rows, agreed)
        if matmuls is None:
            return super()._all_reduce(x, weight_t, bias, overlap, meanwhile)
        out = x.new_empty(*x.shape[:-1], out_features)
        self._enqueue(matmuls.matmul_all_reduce, flat, weight_t, bias, rows, out, overlap, meanwhile)
        return out

    def _enqueue(
        self,
        call: Callable[..., object],
        x: Tensor,
        weight_t: Tensor,
        bias: Tensor | None,
        rows: Sequence[int],
        out: Tensor,
        overlap: bool,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        """``call`` of ``x`` into ``out``, with ``meanwhile`` beside it on the current stream, or after it."""
        weight, transposed = _as_it_lies(weight_t)
        options = {"transposed": transposed, "one_by_one": not overlap, "outs": [out.view(-1, out.shape[-1])]}
        if overlap and meanwhile is not None:
            with self._side.behind_current():
                call([x], [weight], rows, **options)
            try:
                meanwhile()
            finally:
                self._side.rejoin()
        else:
            call([x], [weight], rows, **options)
            if meanwhile is not None:
                meanwhile()
        if bias is not None:
            out.add_(bias)

    def _matmuls_for(self, dtype: torch.dtype, rows: Sequence[int], agreed: Agreed) -> OverlappedMatmuls | None:
        """Overlapped products for a call that all ranks have shown; grown if they are too small, on all ranks at once.

        Args:
            rows: of every rank's shard.

        Returns:
            None, on all ranks: a rank has no features, which overlapped products do not take.
        """
        if not (agreed.in_features and agreed.out_features):
            return None
        needed = _Capacity(sum(rows), max(rows), agreed.in_features, agreed.out_features)
        if dtype in self._matmuls:
            found, capacity = self._matmuls[dtype]
            if all(need <= have for need, have in zip(needed, capacity, strict=True)):
                return found
            needed = _Capacity(*map(max, needed, capacity))
            found.synchronize(self.comm.timeout_s)
            self.comm.agree([0])  # nobody reads this rank's old workspace any more
            del found, self._matmuls[dtype]
        largest = [
            min(needed.rows_of_one, max(needed.rows - needed.rows_of_one * rank, 0))
            for rank in range(self.comm.world_size)
        ]
        made = OverlappedMatmuls(self._ranks, largest, needed.in_features, needed.out_features, dtype)
        self._matmuls[dtype] = made, needed
        return made

    def _release(self) -> None:
        """The group has failed: end what waits on the device for other ranks."""
        for matmuls, _ in list(self._matmuls.values()):
            with contextlib.suppress(PycommError):  # which says that they did not come
                matmuls.synchronize(_RELEASE_S)


def _as_it_lies(weight_t: Tensor) -> tuple[Tensor, bool]:
    """Contiguous memory of [K, N] ``weight_t``, and whether it is that (or its transpose)."""
    if weight_t.t().is_contiguous():
        return weight_t.t(), False
    return weight_t.contiguous(), True
