"""What happens to gradients between autograd and ``.grad``: bucketing, overlap with backward, accumulation.

A hook per parameter runs when autograd has accumulated its gradient. A synchronising backward goes:

1. The first hook (or the hook on the output of forward) queues ``finish`` to run at the end of this backward.
2. Each hook puts its gradient into the bucket. When all of a bucket are there it can be launched: an asynchronous
   all-reduce that runs while autograd computes the gradients of earlier layers.
3. Launches go strictly in bucket order, since collectives must be issued in the same order on every rank, whatever the
   order in which hooks run there.
4. ``finish`` launches what remains and waits for all, so ``.grad`` is final when ``backward()`` returns.

The last bucket is always launched by ``finish``. It gets ready with the very last gradient anyway, and so it can carry
one element per rank that says whether that rank's backward came to its end: a rank whose backward raised sends the
rest of its buckets from its next forward with that element set, and then every rank drops the step and can go on.
"""

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import Variable

from pycomm.communicator import Communicator, Work
from pycomm.data_parallel.bucket import Bucket, Slot
from pycomm.errors import PycommError

_NUM_NAMED = 5  # parameters that an error message names


class GradientEngine:
    """Owns the buckets and the hooks of one wrapped model.

    Autograd may run hooks on its own threads, so they take a lock; on the CPU they run in the thread of backward().

    Args:
        buckets: in launch order, the same on all ranks.
        status: [world_size] zeros at the end of the last bucket.
        overlap: launch from the hooks; False: the same all-reduces one after the other when backward is done.
        find_unused: a parameter without a gradient counts as zeros instead of being an error.
    """

    def __init__(
        self, buckets: Sequence[Bucket], status: Tensor, comm: Communicator, *, overlap: bool, find_unused: bool
    ) -> None:
        self.exposed_comm_s = 0.0
        self._buckets = buckets
        self._status = status
        self._comm = comm
        self._overlap = overlap
        self._find_unused = find_unused
        self._lock = threading.Lock()
        self._no_sync_depth = 0
        self._num_launched = 0
        self._works: list[Work] = []
        # None between backwards. Autograd alone owns the callback that this refers to: if it is gone and nobody has
        # set None, then that backward ended with an exception before the callback could run.
        self._end: weakref.ref[_EndOfBackward] | None = None
        for slot in self._slots():
            slot.param.register_post_accumulate_grad_hook(partial(_on_gradient, weakref.ref(self), weakref.ref(slot)))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A backward that runs inside accumulates locally."""
        self._no_sync_depth += 1
        try:
            yield
        finally:
            self._no_sync_depth -= 1

    def watch(self, output: Tensor) -> None:
        """See a backward begin at ``output``, which is no leaf, so that it is the outermost one.

        Reentrant checkpointing runs backwards inside a backward; a callback queued by a hook in there would run too
        early. Outputs of forward are outside of them.
        """
        output.register_hook(partial(_on_output, weakref.ref(self)))

    def recover(self) -> None:
        """After a synchronising backward that raised: send what peers still wait for, drop its gradients.

        Raises:
            PycommError: it was interrupted in the wait at its end, when peers had been told that all is well.
        """
        with self._lock:
            if not self._is_interrupted():
                return
            if self._num_launched == len(self._buckets):
                self._give_up("a backward was interrupted while it waited for its last bucket")
            self._status[self._comm.rank] = 1
            try:
                self._complete()
            finally:
                self._drop_gradients()

    def gradient_arrived(self, slot: Slot) -> None:
        """Autograd has accumulated into ``slot.param.grad``."""
        with self._lock:
            self._require_not_interrupted()
            _check_gradient(slot)
            if self._no_sync_depth:
                slot.adopt()
                slot.unreduced = True
                return
            self._begin()
            if slot.ready:
                raise PycommError(
                    f"DataParallel: {slot.name!r} got a gradient twice in one backward (shared between reentrant "
                    "checkpoints?); its bucket may be on its way already. Use checkpoint(..., use_reentrant=False)"
                )
            slot.adopt()
            slot.ready = True
            self._buckets[slot.bucket_index].num_pending -= 1
            if self._overlap:
                self._launch_ready()

    def backward_began(self) -> None:
        """Backward has reached an output of forward."""
        with self._lock:
            self._require_not_interrupted()
            if not self._no_sync_depth:
                self._begin()

    def finish(self) -> None:
        """End of backward: reduce what remains and wait."""
        with self._lock:
            if not any(slot.ready for slot in self._slots()):
                self._end = None  # torch.autograd.grad() went through an output; no parameter was asked for
                return
            start = time.perf_counter()
            self._complete_missing()
            self._complete()
            failed = torch.nonzero(self._status).flatten().tolist()
            if failed:
                self._drop_gradients()
                raise PycommError(
                    f"DataParallel: backward failed on rank(s) {failed}; the gradients of this step, accumulated ones "
                    "included, were set to zero on every rank. Skip the step on every rank, or stop"
                )
            self.exposed_comm_s = time.perf_counter() - start

    def _slots(self) -> Iterator[Slot]:
        return (slot for bucket in self._buckets for slot in bucket.slots)

    def _begin(self) -> None:
        if self._end is None:
            # Not kept in a local variable: a traceback that holds this frame would keep it alive.
            self._end = _queue_at_end_of_backward(self)

    def _is_interrupted(self) -> bool:
        return self._end is not None and self._end() is None

    def _require_not_interrupted(self) -> None:
        if self._is_interrupted():
            raise PycommError(
                "DataParallel: an earlier backward ended with an exception; call forward through DataParallel, which "
                "starts again together with the other ranks, before the next backward"
            )

    def _launch_ready(self) -> None:
        while self._num_launched < len(self._buckets) - 1 and not self._buckets[self._num_launched].num_pending:
            self._launch_next()

    def _launch_next(self) -> None:
        bucket = self._buckets[self._num_launched]
        self._num_launched += 1
        work = self._comm.all_reduce(bucket.flat, op="avg", async_op=self._overlap)
        if work is not None:
            self._works.append(work)

    def _complete(self) -> None:
        """Launch the rest, wait for all, be idle. Idle after an error too: a broken communicator repeats it later."""
        errors: list[PycommError] = []
        try:
            while self._num_launched < len(self._buckets):
                self._launch_next()
        except PycommError as error:
            errors.append(error)
        # All works, also after an error: hooks of the next backward must not write to a bucket that still travels.
        errors = [error for error in map(_error_of, self._works) if error is not None] + errors
        self._become_idle()
        if errors:
            raise errors[0]

    def _become_idle(self) -> None:
        self._end = None
        self._num_launched = 0
        self._works.clear()
        for bucket in self._buckets:
            bucket.num_pending = len(bucket.slots)
            for slot in bucket.slots:
                slot.ready = slot.unreduced = False

    def _complete_missing(self) -> None:
        """Put a value into every slot that no hook has filled in this backward, or say that one has none."""
        missing = []
        for slot in self._slots():
            if slot.ready:
                continue
            if slot.param.grad is None:
                missing.append(slot)
            elif slot.param.grad is not slot.view:
                slot.adopt()  # the user's own tensor
            elif not slot.unreduced:
                missing.append(slot)
        if missing and not self._find_unused:
            in_model_order = missing[::-1]
            names = ", ".join(repr(slot.name) for slot in in_model_order[:_NUM_NAMED])
            more = f" and {len(missing) - _NUM_NAMED} more" if len(missing) > _NUM_NAMED else ""
            self._give_up(
                f"{len(missing)} parameter(s) got no gradient in this backward: {names}{more}. Use them in the loss, "
                "freeze them with requires_grad_(False) before wrapping, or pass find_unused=True (zeros then)"
            )
        for slot in missing:
            if slot.param.grad is None:
                slot.view.zero_()
                slot.param.grad = slot.view

    def _give_up(self, reason: str) -> NoReturn:
        """Tell the peers, which wait for this rank, and raise."""
        self._become_idle()
        self._comm.abort(f"DataParallel: {reason}")
        raise PycommError(f"DataParallel on rank {self._comm.rank}: {reason}")

    def _drop_gradients(self) -> None:
        for bucket in self._buckets:
            bucket.flat.zero_()


class _EndOfBackward:
    """The callback that autograd runs at the end of a backward, and drops if the backward raises."""

    def __init__(self, engine: GradientEngine) -> None:
        self._engine = engine

    def __call__(self) -> None:
        self._engine.finish()


def _queue_at_end_of_backward(engine: GradientEngine) -> "weakref.ref[_EndOfBackward]":
    end = _EndOfBackward(engine)
    Variable._execution_engine.queue_callback(end)
    return weakref.ref(end)


def _error_of(work: Work) -> PycommError | None:
    try:
        work.wait()
    except PycommError as error:
        return error
    return None


def _check_gradient(slot: Slot) -> None:
    grad = slot.param.grad
    if grad is None:
        raise PycommError(f"DataParallel: a hook registered before wrapping took the gradient of {slot.name!r} away")
    if grad.layout != torch.strided:
        raise PycommError(f"DataParallel: the gradient of {slot.name!r} is sparse; build its layer with sparse=False")
    if grad.requires_grad:
        raise PycommError(
            "DataParallel: backward(create_graph=True) is not possible, since averaging is no part of the graph; "
            "torch.autograd.grad(..., create_graph=True) followed by backward() is"
        )


# Hooks live as long as the parameters. They hold no strong reference, so that a wrapper that is gone frees its buckets
# and leaves a plain module behind.
def _on_gradient(engine: "weakref.ref[GradientEngine]", slot: "weakref.ref[Slot]", _param: Tensor) -> None:
    live_engine, live_slot = engine(), slot()
    if live_engine is not None and live_slot is not None:
        live_engine.gradient_arrived(live_slot)


def _on_output(engine: "weakref.ref[GradientEngine]", _grad: Tensor) -> None:
    live_engine = engine()
    if live_engine is not None:
        live_engine.backward_began()
