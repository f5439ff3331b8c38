"""Gradients that stay: ``.grad`` of every parameter is a view of a bucket."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pycomm import _C
from pycomm.data_parallel.gradients import Gradients, block_norms
from pycomm.data_parallel.layout import NORM_BLOCK, Bucket, Family, TrainedParam
from pycomm.data_parallel.partial import PartialGradient
from pycomm.errors import PycommError


class FlatGradients(Gradients):
    """All gradients, averaged on every rank; or, after :meth:`divide`, this rank's shard averaged, the rest as it is.

    Each family has one flat buffer, whose slices are the buckets, so rebuilding them moves gradients inside it.
    """

    packed = False

    def _allocate(self) -> None:
        self._is_divided = False
        self._waits_for_step = False  # averages are made in the optimizer's step, or when they are asked for
        wire = self.options.wire_dtype
        # What travels: the gradients themselves, or a copy of them in the dtype of the wire.
        self._messages = {family: self._memory(family.numel, wire or family.grad_dtype) for family in self.families}
        self.buffers = self._messages
        if wire is not None:
            self.buffers = {f: torch.zeros(max(1, f.numel), dtype=f.grad_dtype) for f in self.families}
        self._offsets: dict[Bucket, int] = {}
        self._runs: dict[Bucket, _C.Runs] = {}
        self._first_runs: dict[Family, _C.Runs] = {}  # the first block of every shard, and their numbers
        self._first_blocks: list[int] = []
        self._scattered: set[TrainedParam] = set()  # an average in this rank's shard, and older values elsewhere
        self._carried: dict[TrainedParam, Tensor] = {}  # averages of earlier backwards, to be added to the next
        self._versions: list[int] = []  # of the buffers when the norms were taken

    def divide(self) -> None:
        """From now on only this rank's shard is averaged (ZeRO-1)."""
        self._is_divided = True
        for trained in self.params:
            has_gradient = trained.param.grad is trained.view
            self._show(trained)
            if has_gradient:
                trained.param.grad = trained.view
        # Without overlap nothing is gained by averaging before the optimizer's step, which can do it on the way.
        self._waits_for_step = self.one_pass and not self.options.overlap and self.options.wire_dtype is None

    def before_backward(self) -> None:
        # Autograd accumulates into .grad. Where only a shard is averaged, the average of the sum would be wrong: keep
        # the shard aside, and let autograd store a fresh gradient.
        for trained in self._scattered:
            if trained.param.grad is trained.view:
                carried = self._carried.get(trained)
                own = self._shard_in_buffer(trained)
                self._carried[trained] = own.clone() if carried is None else carried + own
                trained.param.grad = None
        self._scattered.clear()

    def keep(self, trained: TrainedParam) -> None:
        # After zero_grad(set_to_none=True) autograd stores a fresh tensor in .grad. Copying it here reads S and writes
        # S bytes. The other way to get it into the bucket, zeroing the view before backward so that autograd
        # accumulates into it, writes S, then reads 2 S and writes S; it would also turn -0.0 into 0.0.
        grad, view = trained.param.grad, trained.view
        assert view is not None
        if grad is view:
            if trained in self._scattered:
                raise PycommError(
                    f"DataParallel: {trained.name!r} was accumulated onto a gradient of which only this rank's shard "
                    "is averaged, by a backward that went through no output of forward; call zero_grad() before it"
                )
            return
        self._scattered.discard(trained)
        with torch.no_grad():
            view.zero_() if grad is None else view.copy_(grad)
        trained.param.grad = view

    def launch(self, bucket: Bucket) -> None:
        if bucket.numel > 0 and not self._waits_for_step:
            self._send(bucket)

    def wait(self) -> bool:
        if self._waits_for_step and not self._carried:  # the step cannot add those
            return False
        if self._waits_for_step:
            self._send_all()
        super().wait()
        self._were_averaged(with_norms=self.one_pass)
        return True

    def drop(self) -> None:
        for buffer in self.buffers.values():
            buffer.zero_()
        self._carried.clear()
        self._scattered.clear()

    def were_zeroed(self) -> None:
        if all(trained.param.grad is None for trained in self.params):
            self._scattered.clear()

    def are_complete(self) -> bool:
        missing = [trained.name for trained in self.params if trained.param.grad is None]
        if len(missing) == len(self.params):
            return False
        if missing:
            raise PycommError(
                f"{len(missing)} averaged gradient(s) are gone before the step, the first: {missing[0]!r}"
            )
        for trained in self.params:
            if trained.param.grad is not trained.view:
                self.keep(trained)
        return True

    def were_taken(self) -> None:
        if not self.step.is_averaged:
            self._were_averaged(with_norms=False)
            self.step.averaged()

    def give_back(self) -> None:
        """Free the memory; not to be used any more."""
        for trained in self.params:
            if trained.param.grad is trained.view:
                trained.param.grad = None
            trained.view = None
        self.buffers.clear()
        self._messages.clear()
        self._travels.clear()

    def parts(self, trained: TrainedParam) -> list[tuple[int, Tensor]]:
        self._average_now()
        self._norms_hold = False
        begin, grad = trained.shard.begin, trained.param.grad
        parts = [(begin, self._carried[trained])] if trained in self._carried else []
        if grad is not None:
            is_whole = trained not in self._scattered
            parts.append((0, grad.as_subclass(Tensor)) if is_whole else (begin, self._shard_in_buffer(trained)))
        return parts

    def norm_table(self) -> Tensor:
        self._average_now()
        return super().norm_table()

    def reorder(self, params: Sequence[TrainedParam]) -> None:
        norms_hold = self._norms_are_true()
        old = [(trained, trained.view, self.starts[trained]) for trained in params]
        saved = {family: buffer.clone() for family, buffer in self.buffers.items()}
        super().reorder(params)
        with torch.no_grad():
            for trained, view, start in old:
                assert trained.view is not None
                trained.view.copy_(trained.view_in(saved[trained.family], start))
                if trained.param.grad is view:
                    trained.param.grad = trained.view
        self._note_norms(norms_hold)

    def _average_now(self) -> None:
        """Do what was left to the optimizer's step."""
        if not self.step.is_averaged:
            self._send_all()
            self._were_averaged(with_norms=True)
            self.step.averaged()

    def _were_averaged(self, *, with_norms: bool) -> None:
        self._note_norms(with_norms and not self._carried)
        with torch.no_grad():
            for trained, carried in self._carried.items():
                self._shard_in_buffer(trained).add_(carried)
        self._carried.clear()
        if self._is_divided:
            self._scattered.update(self.params)

    def _send_all(self) -> None:
        for bucket in self.buckets:
            if bucket.numel > 0:
                self._send(bucket)

    def _send(self, bucket: Bucket) -> None:
        gradient, message = self._slice(self.buffers, bucket), self._slice(self._messages, bucket)
        then = None
        if self.options.wire_dtype is not None:
            message.copy_(gradient)
            then = partial(gradient.copy_, message)
        self._average(message, self._runs[bucket], to_all=not self._is_divided, then=then)

    def _lay_out(self) -> None:
        """Families' buckets one after the other in their flat buffer."""
        self.layout += 1
        used = dict.fromkeys(self.families, 0)
        self._offsets.clear()
        self._runs.clear()
        for bucket in self.buckets:
            self._offsets[bucket] = offset = used[bucket.family]
            for trained in bucket.params:
                self.starts[trained] = used[bucket.family]
                used[bucket.family] += trained.padded_numel
                self._show(trained)
            self._runs[bucket] = _C.Runs([p.run(p.shard, grad=self.starts[p] - offset) for p in bucket.params])
        self._first_blocks.clear()
        for family in self.families:
            runs = [p.run(p.shard, grad=self.starts[p]) for p in family.params if len(p.shard) > 0]
            self._first_runs[family] = _C.Runs([run._replace(numel=min(run.numel, NORM_BLOCK)) for run in runs])
            self._first_blocks += [run.first_block for run in runs]

    def _show(self, trained: TrainedParam) -> None:
        """Make the view of the parameter's place that becomes ``.grad``."""
        view = trained.view_in(self.buffers[trained.family], self.starts[trained])
        trained.view = PartialGradient.of(view, trained, weakref.ref(self)) if self._is_divided else view

    def _slice(self, buffers: dict[Family, Tensor], bucket: Bucket) -> Tensor:
        offset = self._offsets[bucket]
        return buffers[bucket.family][offset : offset + bucket.numel]

    def _shard_in_buffer(self, trained: TrainedParam) -> Tensor:
        start = self.starts[trained]
        return self.buffers[trained.family][start + trained.shard.begin : start + trained.shard.end]

    def _own(self, trained: TrainedParam) -> Tensor | None:
        grad = trained.param.grad  # the user's own tensor perhaps
        if grad is None:
            return None
        return trained.in_memory_order(grad.as_subclass(Tensor))[trained.shard.begin : trained.shard.end]

    def _note_norms(self, hold: bool) -> None:
        self._norms_hold, self._versions = hold, self._current_versions()

    def _current_versions(self) -> list[int]:
        # Views share the counter of their flat buffer, so a change of any .grad in place is counted.
        return [buffer._version for buffer in self.buffers.values()]

    def _norms_are_true(self) -> bool:
        """Whether the gradients are still those that were averaged: the same tensors, and what is read of them.

        torch counts most changes in place, but not those of GradScaler or through .data; so one block of each
        parameter is looked at, too.
        """
        if not self._norms_hold or self._versions != self._current_versions():
            return False
        if any(trained.param.grad is not trained.view for trained in self.params):
            return False
        found = torch.zeros_like(self._norms)
        for family, runs in self._first_runs.items():
            block_norms(self.buffers[family], runs, found)
        return torch.equal(found[self._first_blocks], self._norms[self._first_blocks])
