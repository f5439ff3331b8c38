"""Matrix products with their communication overlapped, on the ranks of :class:`KernelRanks`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm import _C
from pycomm.arguments import dtype_name
from pycomm.gpu.memory import in_wheels, tensor_at
from pycomm.gpu.ranks import KernelRanks

__all__ = ["OverlappedMatmuls", "cublaslt_names"]

_WORKSPACE_BYTES = 32 << 20  # what cuBLASLt's best algorithms want on Hopper


class OverlappedMatmuls:
    """``all_gather_matmul``, ``matmul_reduce_scatter`` and ``matmul_all_reduce`` (csrc/cuda/matmul/plan.hpp).

    Products are cuBLASLt's, rows move by copy engine, and flags in symmetric memory order the ranks. Calls are
    enqueued behind the current stream's work, and its later work comes behind them; they cannot be captured in a graph.

    Every call takes ``transposed``: weights lie as [K, N] instead of [N, K]; ``one_by_one``: its steps run one after
    the other, with the same bits; ``outs``: where results go, of each local rank, instead of new tensors.

    Args:
        ranks: whose calls these are. Making one is collective where they are processes.
        rows: the most rows of each rank's shard.
        in_features, out_features: at most.
        num_pieces: that other ranks' rows are cut into: more start earlier, and cost the product more.
        num_lanes: products that may wait for their rows independently of each other.
        comm_multiprocessors: kept free of products, for reductions and other communication; 0: none.
    """

    def __init__(
        self,
        ranks: KernelRanks,
        rows: Sequence[int],
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        *,
        num_pieces: int = 1,
        num_lanes: int = 8,
        comm_multiprocessors: int = 0,
    ) -> None:
        size = dtype.itemsize
        capacity = (sum(rows), max(rows), in_features * size, out_features * size)
        self._ranks, self._dtype = ranks, dtype
        memory = ranks.memory(_C.matmul_workspace_bytes(capacity, ranks.num_ranks))
        num_multiprocessors = torch.cuda.get_device_properties(ranks.device).multi_processor_count
        self._core = _C.OverlappedMatmul(
            memory,
            ranks.device.index,
            ranks.local_ranks,
            capacity,
            list(cublaslt_names()),
            num_pieces,
            num_lanes,
            num_multiprocessors - comm_multiprocessors if comm_multiprocessors else 0,
            comm_multiprocessors or num_multiprocessors,
            _WORKSPACE_BYTES,
        )

    def all_gather_matmul(
        self, xs: Sequence[Tensor], weights: Sequence[Tensor], rows: Sequence[int], **options: Any
    ) -> list[Tensor]:
        """``cat(x over ranks) @ weight.T`` of each local rank. ``rows``: of every rank's x."""
        return self._call("all_gather_matmul", xs, weights, rows, **options)

    def matmul_reduce_scatter(
        self, xs: Sequence[Tensor], weights: Sequence[Tensor], rows: Sequence[int], **options: Any
    ) -> list[Tensor]:
        """Own ``rows`` of the sum over ranks of ``x @ weight.T``, of each local rank."""
        return self._call("matmul_reduce_scatter", xs, weights, rows, **options)

    def matmul_all_reduce(
        self, xs: Sequence[Tensor], weights: Sequence[Tensor], rows: Sequence[int], **options: Any
    ) -> list[Tensor]:
        """The sum over ranks of ``x @ weight.T``, of each local rank; rank r sums ``rows[r]`` of them."""
        return self._call("matmul_all_reduce", xs, weights, rows, **options)

    def gathered(self, rows: Sequence[int], in_features: int) -> Tensor:
        """What an ``all_gather_matmul`` has gathered for the first local rank: [sum(rows), in_features].

        The rows of that rank are undefined. It is the workspace's own memory, until the next call: read it, or write
        it, on the stream of the call.
        """
        num_bytes = sum(rows) * in_features * self._dtype.itemsize
        memory = tensor_at(self._core.gathered(), num_bytes, self._ranks.device, self)
        return memory.view(self._dtype).view(sum(rows), in_features)

    def synchronize(self, timeout_s: float = 60.0) -> None:
        """Wait for the last call. Any thread may, also while another one enqueues.

        Raises:
            PeerTimeoutError: it is not over; names the ranks that did not come. No later call is possible.
        """
        self._core.wait(timeout_s)

    def _call(
        self,
        op: str,
        xs: Sequence[Tensor],
        weights: Sequence[Tensor],
        rows: Sequence[int],
        *,
        transposed: bool = False,
        one_by_one: bool = False,
        outs: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        local = self._ranks.local_ranks
        if len(xs) != len(local) or len(weights) != len(local) or len(rows) != self._ranks.num_ranks:
            raise ValueError(
                f"{op}: one x and one weight for each of {len(local)} local ranks, and rows of "
                f"{self._ranks.num_ranks} ranks, are needed"
            )
        in_features, out_features = weights[0].shape if transposed else weights[0].shape[::-1]
        scatters = op == "matmul_reduce_scatter"
        shapes = [(rows[rank] if scatters else sum(rows), out_features) for rank in local]
        if outs is None:
            outs = [torch.empty(shape, dtype=self._dtype, device=self._ranks.device) for shape in shapes]
        for rank, x, weight, out, shape in zip(local, xs, weights, outs, shapes, strict=True):
            wanted = rows[rank] if op == "all_gather_matmul" else sum(rows)
            if x.shape != (wanted, in_features) or weight.shape != weights[0].shape or out.shape != shape:
                raise ValueError(
                    f"{op}: rank {rank} has x {tuple(x.shape)}, weight {tuple(weight.shape)}, out {tuple(out.shape)}; "
                    f"({wanted}, {in_features}), {tuple(weights[0].shape)} and {shape} were expected"
                )
            for tensor in (x, weight, out):
                if tensor.dtype != self._dtype or tensor.device != self._ranks.device or not tensor.is_contiguous():
                    raise ValueError(
                        f"{op}: contiguous {self._dtype} tensors on {self._ranks.device} are needed, not "
                        f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
                    )
        tensors = [
            (x.data_ptr(), weight.data_ptr(), out.data_ptr()) for x, weight, out in zip(xs, weights, outs, strict=True)
        ]
        stream = torch.cuda.current_stream(self._ranks.device).cuda_stream
        name = dtype_name(self._dtype)
        self._core.enqueue(op, name, list(rows), in_features, out_features, transposed, one_by_one, tensors, stream)
        return list(outs)


def cublaslt_names() -> Iterator[str]:
    """Where cuBLASLt may be, best first: in the process already (torch's), in NVIDIA's wheels, in the system."""
    sonames = ("libcublasLt.so.13", "libcublasLt.so.12")
    yield from (f"loaded:{name}" for name in sonames)
    for folder, name in zip(("cu13", "cublas"), sonames, strict=True):
        yield from in_wheels(folder, name)
    yield from sonames
