"""The kernels of the ranks of a group that this process launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from pycomm import _C
from pycomm.arguments import dtype_name
from pycomm.errors import BackendUnavailableError
from pycomm.gpu.grids import NUM_THREADS, ONE_SHOT_CHUNK, Grid, grid_of, one_shot_grid
from pycomm.gpu.memory import tensors_of

__all__ = ["Bucket", "KernelRanks", "kernel_device"]

AdamWOptions = tuple[float, float, float, float, float, int]  # lr, beta1, beta2, eps, weight_decay, step


class Bucket:
    """``tensors`` and their places in flat ``memory``, in order and without gaps, with the table that kernels read.

    Args:
        tensors: contiguous, of one dtype (float32, float16 or bfloat16), on one GPU. They are kept alive.
        dtype: of the bucket's memory.
    """

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        if not tensors:
            raise ValueError("a bucket needs at least one tensor")
        first = tensors[0]
        for tensor in tensors:
            if tensor.dtype != first.dtype or tensor.device != first.device or not tensor.is_contiguous():
                raise ValueError(
                    f"a bucket's tensors are contiguous and of one dtype and device, not {tensor.dtype} on "
                    f"{tensor.device} beside {first.dtype} on {first.device}"
                )
        rows, element, chunk = [], 0, 0
        for tensor in tensors:
            rows.append([element, tensor.numel(), chunk, tensor.data_ptr()])
            element += tensor.numel()
            chunk += -(-tensor.numel() // _C.CHUNK_ELEMENTS)
        self.tensors = list(tensors)
        self.num_chunks = chunk
        self.memory = torch.empty(element, dtype=dtype, device=first.device)
        self.squares = torch.empty(chunk, dtype=torch.float64, device=first.device)
        self.non_finite = torch.zeros(1, dtype=torch.int32, device=first.device)
        self._table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(first.device)  # Segment of layout.hpp

    @property
    def table(self) -> tuple[int, int, int, int]:
        """For :class:`pycomm._C.RankGroup`: address, number of segments, of chunks, of elements."""
        return self._table.data_ptr(), len(self.tensors), self.num_chunks, self.memory.numel()


class HostRanks(Protocol):
    """A :class:`pycomm.Communicator` of the host transport, which this layer lies below."""

    rank: int

    @property
    def timeout_s(self) -> float: ...
    @property
    def _host(self) -> _C.HostCommunicator: ...


class KernelRanks:
    """The ranks of a group on one GPU, and their kernels.

    A tensor argument is a list: *by rank*, one of every rank of the group (:meth:`empty`; among virtual ranks any CUDA
    tensors), or *local*, one of each rank that this process launches for. Tensors are contiguous and on this device.
    Calls are enqueued behind the current stream's work, and its later work comes behind them; they can be captured in
    a CUDA graph once each has run before. What goes wrong on the device is raised by :meth:`synchronize`.

    Make one with :meth:`virtual` or :meth:`processes`.
    """

    def __init__(self, pads: _C.GpuMemory, device: torch.device, local_ranks: Sequence[int], timeout_s: float) -> None:
        self.device = device
        self.num_ranks = pads.world_size
        self.local_ranks = list(local_ranks)
        self._group = _C.RankGroup(pads, device.index, self.local_ranks, timeout_s)
        self._communicator: HostRanks | None = None
        self._staging: _C.GpuMemory | None = None
        self._num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    @classmethod
    def virtual(cls, num_ranks: int, *, device: int | None = None, timeout_s: float = 10.0) -> KernelRanks:
        """All ranks of a group in this process, on one GPU.

        Args:
            num_ranks: 1 to 16.
            timeout_s: of each wait of a kernel for another rank.

        Raises:
            BackendUnavailableError: no CUDA code in this build, or no GPU.
        """
        index = kernel_device(device)
        pads = _C.GpuMemory.virtual_ranks(index, num_ranks, _C.SIGNAL_PAD_BYTES)
        return cls(pads, torch.device("cuda", index), range(num_ranks), timeout_s)

    @classmethod
    def processes(cls, comm: HostRanks, *, device: int | None = None, timeout_s: float = 10.0) -> KernelRanks:
        """This process's rank; the others' memory comes as CUDA handles over ``comm``'s sockets. Collective.

        Args:
            comm: of the host transport: ranks of one host. Their GPUs may be one GPU, or such as reach each other.
        """
        index = kernel_device(device)
        pads = _C.GpuMemory.processes(comm._host, index, _C.SIGNAL_PAD_BYTES, comm.timeout_s)
        ranks = cls(pads, torch.device("cuda", index), [comm.rank], timeout_s)
        ranks._communicator = comm
        return ranks

    def memory(self, num_bytes: int) -> _C.GpuMemory:
        """Symmetric memory, zeroed. Collective where ranks are processes."""
        comm, index = self._communicator, self.device.index
        if comm is None:
            return _C.GpuMemory.virtual_ranks(index, self.num_ranks, num_bytes)
        return _C.GpuMemory.processes(comm._host, index, num_bytes, comm.timeout_s)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """A symmetric tensor of every rank, by rank; zeroed."""
        return tensors_of(self.memory(max(prod(shape) * dtype.itemsize, 1)), self.device, shape, dtype)

    def synchronize(self, timeout_s: float = 60.0) -> None:
        """Wait for all calls, and raise what went wrong.

        Raises:
            PeerTimeoutError: a kernel gave up waiting for a rank; names it. The group cannot be used any more.
            PeerLostError: the group was aborted.
            TimeoutError: kernels are still running.
        """
        self._group.wait(timeout_s)

    def abort(self) -> None:
        """Kernels of the group stop, and later ones do nothing, on all ranks."""
        self._group.abort()

    # Collectives.

    def all_reduce(
        self,
        tensors: Sequence[Tensor],
        op: str = "sum",
        *,
        squares: Sequence[Tensor] = (),
        num_blocks: int | None = None,
    ) -> None:
        """Two-shot all-reduce in place of ``tensors``, by rank. ``squares``: by rank, float64 a chunk of 1,024."""
        count = self._same(tensors, self.num_ranks)
        data, sums = _addresses(tensors), _addresses(squares)
        grid = self._grid(count, num_blocks)
        with self._launching():
            for rank in self.local_ranks:
                self._group.all_reduce_two_shot(rank, dtype_name(tensors[0].dtype), op, count, data, sums, grid)

    def all_reduce_one_shot(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        op: str = "sum",
        *,
        wire_dtype: torch.dtype | None = None,
        num_blocks: int | None = None,
    ) -> None:
        """One-shot all-reduce of small local tensors, which may be any memory; an output may be its input."""
        count = self._same(inputs, len(self.local_ranks))
        self._same(outputs, len(self.local_ranks))
        dtype = inputs[0].dtype
        wire = wire_dtype or dtype
        grid = one_shot_grid(count, self._num_multiprocessors // len(self.local_ranks), num_blocks)
        staging = self._one_shot_staging(dtype_name(wire), count, grid)
        parts = [staging.part(rank) for rank in range(self.num_ranks)]
        with self._launching():
            for rank, output, input in zip(self.local_ranks, outputs, inputs, strict=True):
                names = (dtype_name(dtype), dtype_name(wire), op)
                source, target = input.data_ptr(), output.data_ptr()
                self._group.all_reduce_one_shot(
                    rank, *names, count, ONE_SHOT_CHUNK, source, target, parts, staging.bytes, grid
                )

    def reduce_scatter(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        op: str = "sum",
        *,
        squares: Sequence[Tensor] = (),
        num_blocks: int | None = None,
    ) -> None:
        """Part ``rank`` of ``inputs`` (by rank, [N], N divisible by the ranks) reduced into the local ``outputs``.

        ``outputs`` have the inputs' dtype or float32; ``squares``: by rank, float64 a chunk of the whole, where parts
        are whole chunks.
        """
        total = self._same(inputs, self.num_ranks)
        count = self._same(outputs, len(self.local_ranks))
        if count * self.num_ranks != total:
            raise ValueError(f"outputs of {count} elements for inputs of {total} on {self.num_ranks} ranks")
        if squares and count % _C.CHUNK_ELEMENTS != 0:
            raise ValueError(f"squares: parts of {count} elements are not whole chunks of {_C.CHUNK_ELEMENTS}")
        grid = self._grid(total, num_blocks)
        with self._launching():
            for rank, output in zip(self.local_ranks, outputs, strict=True):
                names = (dtype_name(inputs[0].dtype), dtype_name(output.dtype), op)
                parts = _addresses(inputs, rank * count)
                sums = _addresses(squares, rank * count // _C.CHUNK_ELEMENTS)
                self._group.reduce_scatter(rank, *names, count, parts, output.data_ptr(), sums, grid)

    def all_gather(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, num_blocks: int | None = None) -> None:
        """The local ``inputs``, [N / ranks] each, into part ``rank`` of all ``outputs`` (by rank, [N])."""
        total = self._same(outputs, self.num_ranks)
        count = self._same(inputs, len(self.local_ranks))
        if count * self.num_ranks != total or inputs[0].dtype != outputs[0].dtype:
            raise ValueError(f"inputs of {count} {inputs[0].dtype} for outputs of {total} {outputs[0].dtype}")
        grid = self._grid(total, num_blocks)
        num_bytes = count * inputs[0].element_size()
        with self._launching():
            for rank, input in zip(self.local_ranks, inputs, strict=True):
                targets = _addresses(outputs, rank * count)
                self._group.all_gather(rank, input.data_ptr(), num_bytes, targets, grid)

    def shift(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        slots: Sequence[Tensor],
        *,
        by: int = 1,
        num_blocks: int | None = None,
    ) -> None:
        """Every rank puts its local input to rank + ``by`` and gets what came from rank - ``by``.

        ``slots``: by rank, [num_slots, bytes of a message] uint8 for this ``by`` alone; 1, 2, 4 or 8 slots.
        """
        count = self._same(inputs, len(self.local_ranks))
        self._same(outputs, len(self.local_ranks))
        num_bytes = count * inputs[0].element_size()
        if any(slot.dtype != torch.uint8 or slot.dim() != 2 or slot.shape[1] < num_bytes for slot in slots):
            raise ValueError(f"slots: [num_slots, {num_bytes}] uint8 on every rank")
        # Puts and gets of all ranks are resident together.
        grid = self._grid(count, num_blocks, per_rank=2)
        with self._launching():
            for rank, input in zip(self.local_ranks, inputs, strict=True):
                peer = (rank + by) % self.num_ranks
                addresses = [row.data_ptr() for row in slots[peer]]
                self._group.put(rank, peer, input.data_ptr(), num_bytes, addresses, grid)
            for rank, output in zip(self.local_ranks, outputs, strict=True):
                peer = (rank - by) % self.num_ranks
                addresses = [row.data_ptr() for row in slots[rank]]
                self._group.get(rank, peer, output.data_ptr(), num_bytes, addresses, grid)

    # What one rank does alone: for the first local rank.

    def bucket_gather(
        self, bucket: Bucket, scale: float = 1.0, *, accumulate: bool = False, norm: bool = False
    ) -> None:
        """The bucket's memory = scale * its tensors, or += with ``accumulate``; ``norm``: its squares and flag too."""
        squares = (bucket.squares.data_ptr(), bucket.non_finite.data_ptr()) if norm else (0, 0)
        self._bucket(bucket, True, scale, accumulate, *squares)

    def bucket_scatter(self, bucket: Bucket, scale: float = 1.0) -> None:
        """The bucket's tensors = scale * its memory."""
        self._bucket(bucket, False, scale, False, 0, 0)

    def norm(self, squares: Tensor, max_norm: float, result: Tensor) -> None:
        """``result`` [3] float32: the norm, the clip factor, and bits that are not 0 where the norm is not finite."""
        with self._launching():
            rank = self.local_ranks[0]
            self._group.norm(rank, squares.data_ptr(), squares.numel(), max_norm, result.data_ptr())

    # The optimizer.

    def sharded_adamw(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[tuple[Tensor | None, Tensor, Tensor]],
        options: AdamWOptions,
        *,
        clip: Sequence[Tensor] = (),
        num_blocks: int | None = None,
    ) -> None:
        """The fused ZeRO step: reduce (average), clip, AdamW, and write the parameters to every rank.

        Args:
            params: by rank, [N], N divisible by the ranks.
            grads: by rank, [N]; or local, [N / ranks], reduced already.
            states: local: (fp32 master copy, exp_avg, exp_avg_sq), [N / ranks] float32. Without a master copy the
                parameters are float32 and the only ones.
            clip: local: what :meth:`norm` left.
        """
        total = self._same(params, self.num_ranks)
        count = total // self.num_ranks
        whole = grads[0].numel() == total
        self._same(grads, self.num_ranks if whole else len(self.local_ranks))
        if total % self.num_ranks != 0 or any(moment.numel() != count for _, moment, _ in states):
            raise ValueError(f"{total} parameters on {self.num_ranks} ranks: states of {count} elements are needed")
        grid = self._grid(total, num_blocks)
        with self._launching():
            for place, rank in enumerate(self.local_ranks):
                sources = _addresses(grads, rank * count) if whole else [grads[place].data_ptr()]
                state = [0 if tensor is None else tensor.data_ptr() for tensor in states[place]]
                names = (dtype_name(grads[0].dtype), dtype_name(params[0].dtype))
                targets = _addresses(params, rank * count)
                clipping = clip[place].data_ptr() if clip else 0
                self._group.sharded_adamw(rank, *names, count, sources, True, state, targets, options, clipping, grid)

    @contextmanager
    def _launching(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._group.fork(stream)
        try:
            yield
        finally:
            self._group.join(stream)

    def _bucket(
        self, bucket: Bucket, gather: bool, scale: float, accumulate: bool, squares: int, non_finite: int
    ) -> None:
        names = (dtype_name(bucket.tensors[0].dtype), dtype_name(bucket.memory.dtype))
        grid = (max(1, min(16 * self._num_multiprocessors, -(-bucket.num_chunks * 32 // NUM_THREADS))), NUM_THREADS)
        memory = bucket.memory.data_ptr()
        with self._launching():
            rank = self.local_ranks[0]
            self._group.bucket(rank, gather, *names, bucket.table, memory, scale, accumulate, squares, non_finite, grid)

    def _grid(self, count: int, num_blocks: int | None, per_rank: int = 1) -> Grid:
        """Blocks that this GPU's multiprocessors can all hold at a time, no more than there are chunks for."""
        if num_blocks is not None:
            return num_blocks, NUM_THREADS
        most = self._num_multiprocessors // (len(self.local_ranks) * per_rank)
        return grid_of(
            count, 16 * self._num_multiprocessors if self.num_ranks == 1 else min(most, _C.MAX_KERNEL_BLOCKS)
        )

    def _one_shot_staging(self, wire: str, count: int, grid: Grid) -> _C.GpuMemory:
        needed = self._group.staging_bytes(wire, count, ONE_SHOT_CHUNK, grid)
        if self._staging is None or self._staging.bytes < needed:
            if self._communicator is None:
                torch.cuda.synchronize(self.device)  # kernels may be using the old one
            self._staging = self.memory(max(needed, 1 << 20))
        return self._staging

    def _same(self, tensors: Sequence[Tensor], num: int) -> int:
        """Elements of each of ``num`` tensors, after a check that they are alike."""
        if len(tensors) != num:
            raise ValueError(f"{len(tensors)} tensors, {num} are needed")
        first = tensors[0]
        for tensor in tensors:
            alike = tensor.dtype == first.dtype and tensor.numel() == first.numel()
            if not alike or tensor.device != self.device or not tensor.is_contiguous():
                raise ValueError(
                    f"tensors of one dtype and size, contiguous and on {self.device}, are needed; here is a "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} beside a {first.dtype} of shape "
                    f"{tuple(first.shape)}"
                )
        return first.numel()


def _addresses(tensors: Sequence[Tensor], element: int = 0) -> list[int]:
    return [tensor.data_ptr() + element * tensor.element_size() for tensor in tensors]


def kernel_device(device: int | None) -> int:
    """The number of the GPU that kernels are launched on: ``device``, else the current one.

    Raises:
        BackendUnavailableError: no CUDA code in this build, or no GPU.
    """
    if not _C.cuda_build():
        raise BackendUnavailableError(
            "this build of pycomm has no CUDA code: install it with PYCOMM_CUDA=ON, on a machine with nvcc"
        )
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        raise BackendUnavailableError(f"the CUDA kernels need a GPU, and {reason}")
    return torch.cuda.current_device() if device is None else device
