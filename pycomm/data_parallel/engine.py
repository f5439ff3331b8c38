"""What happens to gradients between autograd and ``.grad``: bucketing, overlap with backward, accumulation.

A hook per parameter runs when autograd has accumulated its gradient. A synchronising backward goes:

1. The first hook (or the hook on the output of forward) queues ``finish`` to run at the end of this backward.
2. Each hook puts its gradient into the bucket. When all of a bucket are there it can be launched: an asynchronous
   reduction that runs while autograd computes the gradients of earlier layers.
3. Launches go strictly in bucket order, since collectives must be issued in the same order on every rank, whatever the
   order in which hooks run there.
4. ``finish`` launches what remains and waits for all, so ``.grad`` is final when ``backward()`` returns.
5. The first time, rank 0 says in which order its gradients came, and all rebuild their buckets in that order.

After the last bucket every rank says whether its backward came to its end. One whose backward raised sends the rest of
its buckets from its next forward, says so, and then every rank drops the step and can go on.
"""

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from pycomm.communicator import Communicator
from pycomm.data_parallel.bucket import Slot
from pycomm.data_parallel.gradients import Gradients
from pycomm.data_parallel.join import Joining
from pycomm.errors import MismatchError, PeerTimeoutError, PycommError

_NUM_NAMED = 5  # parameters that an error message names
_JOIN = "If ranks have different numbers of batches, let the loop run inside `with ddp.join():`"


class GradientEngine:
    """Owns the buckets and the hooks of one wrapped model.

    Autograd may run hooks on its own threads, so they take a lock; on the CPU they run in the thread of backward().

    Args:
        gradients: their memory and buckets, the same on all ranks.
        find_unused: a parameter without a gradient counts as zeros instead of being an error.
    """

    def __init__(self, gradients: Gradients, comm: Communicator, *, find_unused: bool) -> None:
        self.exposed_comm_s = 0.0
        self.gradients = gradients
        self.has_averages = False  # since the last time that gradients were zeroed
        # What a ShardedAdamW and clip_grad_norm_ say to each other:
        self.is_sharded = False  # gradients, or what the optimizer makes of them
        self.scales_in_step = False  # clipping leaves gradients as they are, and the optimizer's step scales them
        self.grad_scale = 1.0
        self.norm_is_finite = True  # as far as it was looked at
        self.joining: Joining | None = None
        self._comm = comm
        self._overlap = gradients.options.overlap
        self._find_unused = find_unused
        self._failed = torch.zeros(comm.world_size, dtype=torch.int32, device=comm.device)
        self._lock = threading.Lock()
        self._no_sync_depth = 0
        self._num_launched = 0
        self._has_reported = False  # in the running backward, to the other ranks, that it came to its end
        self._observed: list[Slot] | None = []  # the order in which gradients came; None once buckets are in that order
        # None between backwards. Autograd alone owns the callback that this refers to: if it is gone and nobody has
        # set None, then that backward ended with an exception before the callback could run.
        self._end: weakref.ref[_EndOfBackward] | None = None
        for slot in gradients.slots:
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
            if self._has_reported:
                self._give_up("a backward was interrupted while it waited for its last bucket")
            self._failed[self._comm.rank] = 1
            self._announce()
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
                self.gradients.keep(slot)
                slot.unreduced = True
                return
            self._begin()
            if slot.ready:
                raise PycommError(
                    f"DataParallel: {slot.name!r} got a gradient twice in one backward (shared between reentrant "
                    "checkpoints?); its bucket may be on its way already. Use checkpoint(..., use_reentrant=False)"
                )
            self.gradients.keep(slot)
            slot.ready = True
            self.gradients.buckets[slot.bucket_index].num_pending -= 1
            if self._observed is not None:
                self._observed.append(slot)
            if self._overlap:
                try:
                    self._launch_ready()
                except PycommError as error:
                    self._explain(error)
                    raise

    def backward_began(self) -> None:
        """Backward has reached an output of forward."""
        with self._lock:
            self._require_not_interrupted()
            self.gradients.before_backward()
            if not self._no_sync_depth:
                self._begin()

    def finish(self) -> None:
        """End of backward: reduce what remains and wait."""
        with self._lock:
            if not any(slot.ready for slot in self.gradients.slots):
                self._end = None  # torch.autograd.grad() went through an output; no parameter was asked for
                return
            start = time.perf_counter()
            self._complete_missing()
            self._announce()
            self._complete()
            self._require_nobody_failed()
            self._reorder()
            self.exposed_comm_s = time.perf_counter() - start

    def contribute_zeros(self) -> None:
        """Take part in a backward of the other ranks with gradients of zeros."""
        with self._lock:
            for slot in self.gradients.slots:
                slot.param.grad = None
                self.gradients.keep_zeros(slot)
            self._complete()
            self._require_nobody_failed()
            self._reorder()

    def clear(self) -> None:
        """The gradients were zeroed."""
        self.has_averages = False
        self.gradients.were_zeroed()
        for slot in self.gradients.slots:
            slot.unreduced = False

    def were_taken(self) -> None:
        """The optimizer has made its step with the averages."""
        self.gradients.were_taken()
        self.has_averages = self.gradients.stay

    @property
    def in_no_sync(self) -> bool:
        return self._no_sync_depth > 0

    @property
    def is_accumulating(self) -> bool:
        """Whether gradients were accumulated under no_sync() and not averaged since."""
        return any(slot.unreduced and slot.param.grad is not None for slot in self.gradients.slots)

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

    def _announce(self) -> None:
        if self.joining is not None:
            self.joining.announce(active=True)

    def _launch_ready(self) -> None:
        if self.joining is not None:
            return  # nothing may be sent before finish() has announced this backward
        buckets = self.gradients.buckets
        while self._num_launched < len(buckets) and not buckets[self._num_launched].num_pending:
            self._launch_next()

    def _launch_next(self) -> None:
        bucket = self.gradients.buckets[self._num_launched]
        self._num_launched += 1
        self.gradients.launch(bucket)

    def _complete(self) -> None:
        """Launch the rest, wait for all, be idle. Idle after an error too: a broken communicator repeats it later."""
        errors: list[PycommError] = []
        try:
            while self._num_launched < len(self.gradients.buckets):
                self._launch_next()
            self._has_reported = True
            report = self._comm.all_reduce(self._failed, op="max", async_op=self._overlap)
        except PycommError as error:
            errors.append(error)
            report = None
        try:
            self.gradients.wait()
            if report is not None:
                report.wait()
        except PycommError as error:
            errors.insert(0, error)
        self._become_idle()
        if errors:
            self._explain(errors[0])
            raise errors[0]
        self.has_averages = True
        self.grad_scale, self.norm_is_finite = 1.0, True

    def _explain(self, error: PycommError) -> None:
        """Add what is nearly always behind it if a rank does not come to this backward."""
        left = isinstance(error, (MismatchError, PeerTimeoutError)) or "exited normally" in str(error)
        if left and self.joining is None and _JOIN not in str(error):
            error.args = (f"{error}. {_JOIN}", *error.args[1:])

    def _become_idle(self) -> None:
        self._end = None
        self._num_launched = 0
        self._has_reported = False
        for bucket in self.gradients.buckets:
            bucket.num_pending = len(bucket.slots)
            for slot in bucket.slots:
                slot.ready = slot.unreduced = False

    def _complete_missing(self) -> None:
        """Put a value into every slot that no hook has filled in this backward, or say that one has none."""
        slots = self.gradients.slots
        missing = [slot for slot in slots if not slot.ready and not self.gradients.has_earlier(slot)]
        if missing and not self._find_unused:
            names = ", ".join(repr(slot.name) for slot in missing[:_NUM_NAMED])
            more = f" and {len(missing) - _NUM_NAMED} more" if len(missing) > _NUM_NAMED else ""
            self._give_up(
                f"{len(missing)} parameter(s) got no gradient in this backward: {names}{more}. Use them in the loss, "
                "freeze them with requires_grad_(False) before wrapping, or pass find_unused=True (zeros then)"
            )
        for slot in missing:
            self.gradients.keep_zeros(slot)

    def _require_nobody_failed(self) -> None:
        failed = torch.nonzero(self._failed).flatten().tolist()
        if not failed:
            return
        self._drop_gradients()
        raise PycommError(
            f"DataParallel: backward failed on rank(s) {failed}; the gradients of this step, accumulated ones "
            "included, were set to zero on every rank. Skip the step on every rank, or stop"
        )

    def _reorder(self) -> None:
        """After the first synchronising backward: buckets in the order in which rank 0's gradients came."""
        if self._observed is None:
            return
        slots = self.gradients.slots
        came = dict.fromkeys(self._observed)
        # A gradient that did not come now is expected where the reverse of the model's order has it last.
        order = [*came, *(slot for slot in reversed(slots) if slot not in came)]
        self._observed = None
        message = torch.tensor([slot.index for slot in order], dtype=torch.int64, device=self._comm.device)
        self._comm.broadcast(message, root=0)
        order = [slots[index] for index in message.tolist()]
        if order != [slot for bucket in self.gradients.buckets for slot in bucket.slots]:
            self.gradients.reorder(order)

    def _give_up(self, reason: str) -> NoReturn:
        """Tell the peers, which wait for this rank, and raise."""
        self._become_idle()
        self._comm.abort(f"DataParallel: {reason}")
        raise PycommError(f"DataParallel on rank {self._comm.rank}: {reason}")

    def _drop_gradients(self) -> None:
        self._failed.zero_()
        self.gradients.drop()
        self.has_averages = False


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


def is_averaged(param: nn.Parameter) -> bool:
    """Whether a wrapper that is in use averages the parameter's gradient already."""
    hooks: dict[int, object] = param._post_accumulate_grad_hooks or {}
    return any(
        isinstance(hook, partial) and hook.func is _on_gradient and hook.args[0]() is not None
        for hook in hooks.values()
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
