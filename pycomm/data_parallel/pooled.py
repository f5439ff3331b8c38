"""Gradients that pass by (ZeRO-2): of the averages each rank keeps its shard, and nothing else stays.

A bucket that is complete is copied, piece by piece, into one of two small symmetric buffers, averaged from there into
the shards of all ranks, and its ``.grad`` freed. Pieces are whole norm blocks, so a parameter of any size goes through
buffers of any size.

Ref: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5.2.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pycomm import _C
from pycomm.communicator import Communicator, Work
from pycomm.data_parallel.bucket import Bucket, Family, Slot, plan
from pycomm.data_parallel.gradients import Gradients, Options
from pycomm.data_parallel.norms import norms_of_runs
from pycomm.data_parallel.partial import AbsentGradient
from pycomm.data_parallel.shards import NORM_BLOCK, Row
from pycomm.fused import dtype_name

_NUM_BUFFERS = 2  # one is filled while the other travels
_PART_OF_GRADIENTS = 64  # a buffer has at most this part of all gradients, so that the pool is small beside them
_MIN_BYTES = 64 * 1024


@dataclass(frozen=True)
class Piece:
    """Elements [begin, end) of a parameter's gradient, at ``start`` of a buffer."""

    slot: Slot
    begin: int
    end: int
    start: int


@dataclass(eq=False)
class Load:
    """What one buffer carries at a time."""

    pieces: list[Piece]
    numel: int
    rows: list[Row]


class PooledGradients(Gradients):
    """This rank's shard of the averages, added up over backwards until the optimizer takes it or they are zeroed.

    While there are averages, ``.grad`` of every parameter is an AbsentGradient, except of those that have accumulated
    under no_sync() since.
    """

    stay = False

    def __init__(self, slots: Sequence[Slot], families: Sequence[Family], comm: Communicator, options: Options) -> None:
        super().__init__(slots, families, comm, options)
        self.shards = {family: torch.zeros(max(1, family.num_owned), dtype=family.grad_dtype) for family in families}
        self._is_zero = True  # what the shards have does not count: the next average overwrites it
        self._norms_hold = True  # those that the reductions took are still the shards'
        all_bytes = sum(slot.grad_bytes for slot in slots)
        num_bytes = min(options.cap_bytes, max(_MIN_BYTES, all_bytes // _PART_OF_GRADIENTS))
        # A piece of every dtype fits: at least one norm block of the widest.
        self._buffer_bytes = max(NORM_BLOCK * 8, num_bytes // NORM_BLOCK * NORM_BLOCK)
        self._pool = [self._memory(self._buffer_bytes, torch.uint8) for _ in range(_NUM_BUFFERS)]
        self._num_loads = 0
        self._travelling: list[tuple[Work, Callable[[], None] | None] | None] = [None] * _NUM_BUFFERS
        self._is_shown = False  # by .grad of the parameters
        self._shown = [AbsentGradient.standing_for(slot, weakref.ref(self)) for slot in slots]
        for slot in slots:
            slot.param.register_hook(partial(_before_accumulation, weakref.ref(self)))
        self._lay_out()

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.shards.values(), *self._pool))

    def before_backward(self) -> None:
        self.hide()

    def hide(self) -> None:
        """Autograd shall store fresh gradients, not add to what stands for averages."""
        self._notice_zeroing()
        if self._is_shown:
            self._is_shown = False
            for slot in self.slots:
                if isinstance(slot.param.grad, AbsentGradient):
                    slot.param.grad = None

    def keep(self, slot: Slot) -> None:
        pass  # autograd's own tensor is the place, until the bucket is launched

    def has_earlier(self, slot: Slot) -> bool:
        return slot.param.grad is not None

    def keep_zeros(self, slot: Slot) -> None:
        pass

    def launch(self, bucket: Bucket) -> None:
        for load in self._loads[bucket]:
            self._send(load, bucket.family)
        for slot in bucket.slots:
            slot.param.grad = None

    def wait(self) -> None:
        super().wait()
        self._travelling = [None] * _NUM_BUFFERS
        self._is_zero = False
        self._norms_hold = True
        self._is_shown = True
        for slot, absent in zip(self.slots, self._shown, strict=True):
            slot.param.grad = absent

    def drop(self) -> None:
        self.were_zeroed()
        for slot in self.slots:
            slot.param.grad = None

    def were_zeroed(self) -> None:
        self.hide()
        self._is_zero = True

    def are_complete(self) -> bool:
        self._notice_zeroing()
        return not self._is_zero

    def were_taken(self) -> None:
        self.were_zeroed()

    def give_back(self) -> None:
        self._pool.clear()
        self.shards.clear()

    def parts(self, slot: Slot) -> list[tuple[int, Tensor]]:
        self._norms_hold = False
        shard = self.shards[slot.family][slot.shard.packed : slot.shard.packed + len(slot.shard)]
        averaged = [] if self._is_zero else [(slot.shard.begin, shard)]
        grad = slot.param.grad
        return averaged if grad is None or isinstance(grad, AbsentGradient) else [*averaged, (0, grad)]

    def scale(self, factor: float) -> None:
        for shard in self.shards.values():
            shard.mul_(factor)

    def norm_table(self) -> Tensor:
        table = self._norms.clone()
        if not (self.fused and self._norms_hold):
            for family in self.families:
                rows = [row for bucket in self.buckets if bucket.family is family for row in self._rows(bucket)]
                norms_of_runs(self.shards[family], rows, table, packed=True)
        return self._all_ranks(table)

    def reorder(self, slots: Sequence[Slot]) -> None:
        self.buckets = plan(slots, self.options.cap_bytes)
        self._lay_out()

    def _notice_zeroing(self) -> None:
        """zero_grad() of the plain module takes away what stands for the averages, and so the averages."""
        if self._is_shown and all(slot.param.grad is None for slot in self.slots):
            self._is_shown, self._is_zero = False, True

    def _lay_out(self) -> None:
        self.layout += 1
        self._loads = {bucket: loads_of(bucket, self._capacity(bucket.family)) for bucket in self.buckets}

    def _rows(self, bucket: Bucket) -> list[Row]:
        return [row for load in self._loads[bucket] for row in load.rows]

    def _dtype(self, family: Family) -> torch.dtype:
        return self.options.wire_dtype or family.grad_dtype

    def _capacity(self, family: Family) -> int:
        return self._buffer_bytes // self._dtype(family).itemsize

    def _send(self, load: Load, family: Family) -> None:
        number = self._num_loads % _NUM_BUFFERS
        self._num_loads += 1
        self._finish(number)
        buffer = self._pool[number].view(self._dtype(family))[: load.numel]
        _fill(buffer, load)
        accumulate = not self._is_zero
        then = None
        if self.fused:
            reduction = _C.GradientReduction(
                grads=buffer.data_ptr(),
                count=buffer.numel(),
                dtype=dtype_name(buffer.dtype),
                runs=_C.Runs(load.rows),
                to_all=False,
                shard=self.shards[family].data_ptr(),
                shard_dtype=dtype_name(family.grad_dtype),
                norms=self._norms.data_ptr(),
            )
            work = self.comm.reduce_gradients(reduction, buffer, accumulate=accumulate, async_op=self.options.overlap)
        else:
            work = self.comm.all_reduce(buffer, op="avg", async_op=self.options.overlap)
            then = _taking(buffer, load, self.shards[family], accumulate)
        if work is not None:
            self._travelling[number] = (work, then)
        self._started(work, then)

    def _finish(self, number: int) -> None:
        """Wait until a buffer of the pool may be written."""
        travelling = self._travelling[number]
        if travelling is None:
            return
        work, then = travelling
        work.wait()
        if then is not None:
            then()
        self._under_way.remove(travelling)
        self._travelling[number] = None


def loads_of(bucket: Bucket, capacity: int) -> list[Load]:
    """Cut a bucket into loads of at most ``capacity`` elements, every piece whole norm blocks or a parameter's end."""
    loads: list[Load] = []
    for slot in bucket.slots:
        begin, numel = 0, slot.param.numel()
        while begin < numel:
            free = capacity - loads[-1].numel if loads else 0
            length = numel - begin if numel - begin <= free else free // NORM_BLOCK * NORM_BLOCK
            if length == 0:
                loads.append(Load([], 0, []))
                continue
            load = loads[-1]
            piece = Piece(slot, begin, begin + length, load.numel)
            load.pieces.append(piece)
            load.rows.extend(_owned_row(piece))
            load.numel += length
            begin += length
    return loads


def _owned_row(piece: Piece) -> list[Row]:
    """This rank's run of the piece, if it has one."""
    shard = piece.slot.shard
    begin, end = max(piece.begin, shard.begin), min(piece.end, shard.end)
    if begin >= end:
        return []
    grad = piece.start + begin - piece.begin
    packed = shard.packed + begin - shard.begin
    return [(grad, 0, packed, end - begin, piece.slot.first_block + begin // NORM_BLOCK, 0)]


def _fill(buffer: Tensor, load: Load) -> None:
    with torch.no_grad():
        for piece in load.pieces:
            target = buffer[piece.start : piece.start + piece.end - piece.begin]
            grad = piece.slot.param.grad
            if grad is None:
                target.zero_()
            else:
                target.copy_(piece.slot.in_memory_order(grad)[piece.begin : piece.end])


def _taking(buffer: Tensor, load: Load, shard: Tensor, accumulate: bool) -> Callable[[], None]:
    """What is to be done with averages on every rank: keep this rank's."""

    def take() -> None:
        for grad, _, packed, count, _, _ in load.rows:
            average, target = buffer[grad : grad + count], shard[packed : packed + count]
            if accumulate:
                target.add_(average)
            else:
                target.copy_(average)

    return take


def _before_accumulation(gradients: weakref.ref[PooledGradients], _grad: Tensor) -> None:
    live = gradients()
    if live is not None:
        live.hide()
