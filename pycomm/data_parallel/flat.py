"""Gradients that stay: ``.grad`` of every parameter is a view of a bucket."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pycomm import _C
from pycomm.communicator import Communicator
from pycomm.data_parallel.bucket import Bucket, Family, Slot, plan
from pycomm.data_parallel.gradients import Gradients, Options
from pycomm.data_parallel.norms import norms_of_runs, norms_of_tensor
from pycomm.data_parallel.partial import PartialGradient
from pycomm.data_parallel.shards import NORM_BLOCK, Row, row
from pycomm.errors import PycommError
from pycomm.fused import dtype_name


class FlatGradients(Gradients):
    """All gradients, averaged on every rank; or ``sharded``: this rank's shard averaged, the rest left as it is.

    Each family has one flat buffer, whose slices are the buckets, so rebuilding them moves gradients inside it.
    """

    stay = True

    def __init__(self, slots: Sequence[Slot], families: Sequence[Family], comm: Communicator, options: Options) -> None:
        super().__init__(slots, families, comm, options)
        self.sharded = False
        self.deferred = False  # buckets are averaged by the optimizer's step, or when their norm is asked for
        wire = options.wire_dtype
        # What travels: the gradients themselves, or a copy of them in the dtype of the wire.
        self.messages = {family: self._memory(family.numel, wire or family.grad_dtype) for family in families}
        self.flats = self.messages
        if wire is not None:
            self.flats = {family: torch.zeros(max(1, family.numel), dtype=family.grad_dtype) for family in families}
        self._starts: dict[Slot, int] = {}
        self._offsets: dict[Bucket, int] = {}
        self._reductions: dict[Bucket, _C.GradientReduction] = {}
        self._scattered: set[Slot] = set()  # the view has an average in this rank's shard, and older values elsewhere
        self._carried: dict[Slot, Tensor] = {}  # averages of earlier backwards, to be added to the next
        self._versions: list[int] | None = None  # of the flats when self._norms was theirs
        self._lay_out()

    @property
    def num_bytes(self) -> int:
        tensors = {id(tensor): tensor for tensor in (*self.flats.values(), *self.messages.values())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def shard_between_ranks(self) -> None:
        """From now on only this rank's shard is averaged (ZeRO-1)."""
        self.sharded = True
        for slot in self.slots:
            has_gradient = slot.param.grad is slot.view
            self._show(slot)
            if has_gradient:
                slot.param.grad = slot.view
        # Without overlap nothing is gained by averaging before the optimizer's step, which can do it on the way.
        self.deferred = self.fused and not self.options.overlap and self.options.wire_dtype is None
        self._describe()

    def rows(self, slots: Sequence[Slot]) -> list[Row]:
        """This rank's runs of the flat buffers."""
        return [row(s.shard, s.first_block, grad=self._starts[s]) for s in slots if len(s.shard) > 0]

    def start(self, slot: Slot) -> int:
        """Where the parameter's gradient starts in the flat buffer of its family."""
        return self._starts[slot]

    def before_backward(self) -> None:
        # Autograd accumulates into .grad. Where only a shard is averaged, the average of the sum would be wrong: keep
        # the shard aside, and let autograd store a fresh gradient.
        for slot in self._scattered:
            if slot.param.grad is slot.view:
                carried = self._carried.get(slot)
                own = self._own(slot)
                self._carried[slot] = own.clone() if carried is None else carried + own
                slot.param.grad = None
        self._scattered.clear()

    def keep(self, slot: Slot) -> None:
        # After zero_grad(set_to_none=True) autograd stores a fresh tensor in .grad. Copying it here reads S and writes
        # S bytes. The other way to get it into the bucket, zeroing the view before backward so that autograd
        # accumulates into it, writes S, then reads 2 S and writes S; it would also turn -0.0 into 0.0.
        if slot.param.grad is slot.view:
            if slot in self._scattered:
                raise PycommError(
                    f"DataParallel: {slot.name!r} was accumulated onto a gradient of which only this rank's shard is "
                    "averaged, by a backward that went through no output of forward; call zero_grad() before it"
                )
            return
        assert slot.param.grad is not None
        assert slot.view is not None
        self._scattered.discard(slot)
        with torch.no_grad():
            slot.view.copy_(slot.param.grad)
        slot.param.grad = slot.view

    def has_earlier(self, slot: Slot) -> bool:
        if slot.param.grad is None:
            return False
        if slot.param.grad is slot.view:
            return slot.unreduced
        self.keep(slot)  # the user's own tensor
        return True

    def keep_zeros(self, slot: Slot) -> None:
        assert slot.view is not None
        if slot.param.grad is None:
            slot.view.zero_()
            slot.param.grad = slot.view

    def launch(self, bucket: Bucket) -> None:
        if self.deferred:
            self.unreduced = True
        elif bucket.numel > 0:
            self._launch(bucket)

    def _launch(self, bucket: Bucket) -> None:
        async_op = self.options.overlap
        gradient, message = self._slice(self.flats, bucket), self._slice(self.messages, bucket)
        then = None
        if self.options.wire_dtype is not None:
            message.copy_(gradient)
            then = _copying(message, gradient)
        if self.fused:
            reduction = self._reductions[bucket]
            work = self.comm.reduce_gradients(reduction, message, accumulate=False, async_op=async_op)
        else:
            work = self.comm.all_reduce(message, op="avg", async_op=async_op)
        self._started(work, then)

    def wait(self) -> None:
        super().wait()
        if not self.unreduced:
            self._reduced(with_norms=self.fused)
        elif self._carried:  # the step cannot add them
            self._reduce_now()

    def _reduce_now(self) -> None:
        for bucket in self.buckets:
            if bucket.numel > 0:
                self._launch(bucket)
        self._reduced(with_norms=True)

    def _reduced(self, *, with_norms: bool) -> None:
        """All buckets were averaged, and their norms taken."""
        self.unreduced = False
        self._versions = self._current_versions() if with_norms and not self._carried else None
        with torch.no_grad():
            for slot, carried in self._carried.items():
                self._own(slot).add_(carried)
        self._carried.clear()
        if self.sharded:
            self._scattered.update(self.slots)

    def drop(self) -> None:
        self.unreduced = False
        for flat in self.flats.values():
            flat.zero_()
        self._carried.clear()
        self._scattered.clear()

    def were_zeroed(self) -> None:
        if all(slot.param.grad is None for slot in self.slots):
            self._scattered.clear()

    def are_complete(self) -> bool:
        missing = [slot.name for slot in self.slots if slot.param.grad is None]
        if len(missing) == len(self.slots):
            return False
        if missing:
            raise PycommError(
                f"{len(missing)} averaged gradient(s) are gone before the step, the first: {missing[0]!r}"
            )
        for slot in self.slots:
            if slot.param.grad is not slot.view:  # the user's own tensor
                self.keep(slot)
        return True

    def were_taken(self) -> None:
        if self.unreduced:
            self._reduced(with_norms=False)

    def give_back(self) -> None:
        for slot in self.slots:
            if slot.param.grad is slot.view:
                slot.param.grad = None
            slot.view = None
        self._reductions.clear()
        self.flats.clear()
        self.messages.clear()

    def parts(self, slot: Slot) -> list[tuple[int, Tensor]]:
        if self.unreduced:
            self._reduce_now()
        self._versions = None
        carried = [(slot.shard.begin, self._carried[slot])] if slot in self._carried else []
        if slot.param.grad is None:
            return carried
        if slot in self._scattered:
            return [*carried, (slot.shard.begin, self._own(slot))]
        return [*carried, (0, slot.param.grad.as_subclass(Tensor))]

    def scale(self, factor: float) -> None:
        for flat in self.flats.values():
            flat.mul_(factor)

    def norm_table(self) -> Tensor:
        if self.unreduced:
            self._reduce_now()
        if self.fused:
            # The ranks agree on whether the norms that the reduction took are still those of the gradients.
            stale = 0.0 if self._norms_hold() else 1.0
            table = self._all_ranks(torch.cat([self._norms, torch.tensor([stale], dtype=torch.float64)]))
            if table[-1] == 0:
                return table[:-1]
        table = torch.zeros_like(self._norms)
        if self.sharded:
            for family in self.families:
                norms_of_runs(self.flats[family], self.rows(family.slots), table, packed=False)
            return self._all_ranks(table)
        for slot in self.slots:
            if slot.param.grad is not None:
                norms_of_tensor(slot.param.grad, slot.first_block, table)
        return table

    def reorder(self, slots: Sequence[Slot]) -> None:
        norms_hold = self._versions is not None and self._norms_hold()
        old = [(slot, slot.view, self._starts[slot]) for slot in slots]
        saved = {family: flat.clone() for family, flat in self.flats.items()}
        self.buckets = plan(slots, self.options.cap_bytes)
        self._lay_out()
        with torch.no_grad():
            for slot, view, start in old:
                assert slot.view is not None
                slot.view.copy_(slot.view_in(saved[slot.family], start))
                if slot.param.grad is view:
                    slot.param.grad = slot.view
        self._versions = self._current_versions() if norms_hold else None

    def _lay_out(self) -> None:
        """Give every slot its place: families' buckets one after the other in their flat buffer."""
        self.layout += 1
        used = dict.fromkeys(self.families, 0)
        self._offsets.clear()
        for bucket in self.buckets:
            self._offsets[bucket] = used[bucket.family]
            for slot, start in zip(bucket.slots, bucket.starts(), strict=True):
                self._starts[slot] = self._offsets[bucket] + start
                self._show(slot)
            used[bucket.family] += bucket.numel
        self._describe()

    def _show(self, slot: Slot) -> None:
        """Make the view of the slot's place that becomes ``.grad``."""
        view = slot.view_in(self.flats[slot.family], self._starts[slot])
        slot.view = PartialGradient.of(view, slot, weakref.ref(self)) if self.sharded else view

    def _describe(self) -> None:
        self._reductions.clear()
        if not self.fused:
            return
        for bucket in self.buckets:
            message = self._slice(self.messages, bucket)
            offset = self._offsets[bucket]
            rows = [
                row(s.shard, s.first_block, grad=self._starts[s] - offset) for s in bucket.slots if len(s.shard) > 0
            ]
            self._reductions[bucket] = _C.GradientReduction(
                grads=message.data_ptr(),
                count=message.numel(),
                dtype=dtype_name(message.dtype),
                runs=_C.Runs(rows),
                to_all=not self.sharded,
                shard=0,
                shard_dtype=dtype_name(message.dtype),
                norms=self._norms.data_ptr(),
            )

    def _slice(self, flats: dict[Family, Tensor], bucket: Bucket) -> Tensor:
        offset = self._offsets[bucket]
        return flats[bucket.family][offset : offset + bucket.numel]

    def _own(self, slot: Slot) -> Tensor:
        """This rank's shard of the parameter's gradient."""
        start = self._starts[slot]
        return self.flats[slot.family][start + slot.shard.begin : start + slot.shard.end]

    def _current_versions(self) -> list[int]:
        # Views share the counter of their flat buffer, so a change of any .grad in place is counted.
        return [flat._version for flat in self.flats.values()]

    def _norms_hold(self) -> bool:
        """Whether the gradients are still those that were averaged: the same tensors, and what is read of them.

        torch counts most changes in place, but not those of GradScaler or through .data; so one block of each
        parameter is looked at, too.
        """
        if self._versions != self._current_versions() or any(s.param.grad is not s.view for s in self.slots):
            return False
        probe = torch.zeros_like(self._norms)
        blocks = []
        for family in self.families:
            rows = [
                (grad, 0, 0, min(count, NORM_BLOCK), block, 0)
                for grad, _, _, count, block, _ in self.rows(family.slots)
            ]
            norms_of_runs(self.flats[family], rows, probe, packed=False)
            blocks += [block for *_, block, _ in rows]
        return torch.equal(probe[blocks], self._norms[blocks])


def _copying(source: Tensor, target: Tensor) -> Callable[[], None]:
    def copy() -> None:
        target.copy_(source)

    return copy
