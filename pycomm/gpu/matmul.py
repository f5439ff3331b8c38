"""Matrix products with their communication overlapped, on the ranks of :class:`KernelRanks`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pycomm import _C
from pycomm.gpu.memory import dtype_name
from pycomm.gpu.ranks import KernelRanks

__all__ = ["OverlappedMatmuls", "cublaslt_names"]

_WORKSPACE_BYTES = 32 << 20  # what cuBLASLt's best algorithms want on Hopper


class OverlappedMatmuls:
    """``all_gather_matmul``, ``matmul_reduce_scatter`` and ``matmul_all_reduce`` (csrc/cuda/matmul/plan.hpp).

    Products are cuBLASLt's, rows move by copy engine, and flags in symmetric memory order the ranks. Calls are
    enqueued behind the current stream's work, and its later work comes behind them; they cannot be captured in a graph.

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

    def all_gather_matmul(self, xs: Sequence[Tensor], weights: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """``cat(x over ranks) @ weight.T`` of each local rank. ``rows``: of every rank's x."""
        return self._call("all_gather_matmul", xs, weights, rows, [sum(rows)] * len(xs))

    def matmul_reduce_scatter(
        self, xs: Sequence[Tensor], weights: Sequence[Tensor], rows: Sequence[int]
    ) -> list[Tensor]:
        """Own ``rows`` of the sum over ranks of ``x @ weight.T``, of each local rank."""
        own = [rows[rank] for rank in self._ranks.local_ranks]
        return self._call("matmul_reduce_scatter", xs, weights, rows, own)

    def matmul_all_reduce(self, xs: Sequence[Tensor], weights: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """The sum over ranks of ``x @ weight.T``, of each local rank; rank r sums ``rows[r]`` of them."""
        return self._call("matmul_all_reduce", xs, weights, rows, [sum(rows)] * len(xs))

    def synchronize(self, timeout_s: float = 60.0) -> None:
        """Wait for the last call.

        Raises:
            PeerTimeoutError: it is not over; names the ranks that did not come. No later call is possible.
        """
        self._core.wait(timeout_s)

    def _call(
        self, op: str, xs: Sequence[Tensor], weights: Sequence[Tensor], rows: Sequence[int], out_rows: Sequence[int]
    ) -> list[Tensor]:
        local = self._ranks.local_ranks
        if len(xs) != len(local) or len(weights) != len(local) or len(rows) != self._ranks.num_ranks:
            raise ValueError(
                f"{op}: one x and one weight for each of {len(local)} local ranks, and rows of "
                f"{self._ranks.num_ranks} ranks, are needed"
            )
        out_features, in_features = weights[0].shape
        for rank, x, weight in zip(local, xs, weights, strict=True):
            wanted = rows[rank] if op == "all_gather_matmul" else sum(rows)
            if x.shape != (wanted, in_features) or weight.shape != (out_features, in_features):
                raise ValueError(
                    f"{op}: rank {rank} has x {tuple(x.shape)} and weight {tuple(weight.shape)}; "
                    f"({wanted}, {in_features}) and ({out_features}, {in_features}) were expected"
                )
            for tensor in (x, weight):
                if tensor.dtype != self._dtype or tensor.device != self._ranks.device or not tensor.is_contiguous():
                    raise ValueError(
                        f"{op}: contiguous {self._dtype} tensors on {self._ranks.device} are needed, not "
                        f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
                    )
        outs = [torch.empty(count, out_features, dtype=self._dtype, device=self._ranks.device) for count in out_rows]
        tensors = [
            (x.data_ptr(), weight.data_ptr(), out.data_ptr()) for x, weight, out in zip(xs, weights, outs, strict=True)
        ]
        stream = torch.cuda.current_stream(self._ranks.device).cuda_stream
        name = dtype_name(self._dtype)
        self._core.enqueue(op, name, list(rows), in_features, out_features, tensors, stream)
        return outs


def cublaslt_names() -> Iterator[str]:
    """Where cuBLASLt may be, best first: in the process already (torch's), in NVIDIA's wheels, in the system."""
    sonames = ("libcublasLt.so.13", "libcublasLt.so.12")
    yield from (f"loaded:{name}" for name in sonames)
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec is not None else None) or ():
        for folder, name in (("cu13", sonames[0]), ("cublas", sonames[1])):
            path = Path(root) / folder / "lib" / name
            if path.is_file():
                yield str(path)
    yield from sonames
