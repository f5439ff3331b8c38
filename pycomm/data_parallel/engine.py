"""What happens to gradients between autograd and ``.grad``: bucketing, overlap with backward, accumulation.

A hook per parameter runs when autograd has accumulated its gradient. A synchronising backward goes:

1. The first hook (or the hook on the output of forward) queues ``finish`` to run at the end of this backward.
2. Each hook puts its gradient into the bucket. When all of a bucket are there it can be launched: an asynchronous
   reduction that runs while autograd computes the gradients of earlier layers.
3. Launches go strictly in bucket order, since collectives must be issued in the same order on every rank, whatever the
   order in which hooks run there.
4. ``finish`` launches what remains and waits for all, so ``.grad`` is final when ``backward()`` returns.
5. The first time, rank 0 says in which order its gradients came, and all rebuild their buckets in that order.

In a ``with ddp.join():`` block every rank says, before the first bucket, whether it has a backward. A rank that has run
out says no, and sends zeros as long as somebody says yes; averages divide by all ranks, as those of
torch.distributed.algorithms.Join.

After the last bucket every rank says whether its backward came to its end. One whose backward raised sends the rest of
its buckets from its next forward, says so, and then every rank drops the step and can go on.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from pycomm.communicator import Communicator
from pycomm.data_parallel.flat import FlatGradients
from pycomm.data_parallel.gradients import Gradients, Options
from pycomm.data_parallel.layout import TrainedParam
from pycomm.data_parallel.pooled import PooledGradients
from pycomm.data_parallel.step import Step
from pycomm.errors import MismatchError, PeerTimeoutError, PycommError

_NUM_NAMED = 5  # parameters that an error message names
_JOIN = "If ranks have different numbers of batches, let the loop run inside `with ddp.join():`"


@dataclass(eq=False)
class _Backward:
    """A synchronising backward that is running."""

    # Autograd alone owns the callback. If it is gone and this backward still counts as running, then it ended with an
    # exception before the callback could run. None: this rank takes part without a backward of its own.
    end: "weakref.ref[partial[None]] | None"
    num_missing: list[int]  # gradients, by bucket
    came: dict[TrainedParam, None] = field(default_factory=dict)  # whose gradients have arrived, in that order
    num_launched: int = 0
    has_reported: bool = False  # to the other ranks, that it came to its end


class GradientEngine:
    """Owns the buckets and the hooks of one wrapped model.

    Autograd may run hooks on its own threads, so they take a lock; on the CPU they run in the thread of backward().

    Args:
        params: those to be averaged, the same on all ranks.
    """

    def __init__(self, params: Sequence[TrainedParam], comm: Communicator, options: Options) -> None:
        self.exposed_comm_s = 0.0
        self.step = Step()
        self.gradients: Gradients = FlatGradients(params, comm, options, self.step)
        self.stage: int | None = None  # of the ShardedAdamW that they belong to; it scales them in its step
        self._comm = comm
        self._options = options
        self._failed = torch.zeros(comm.world_size, dtype=torch.int32, device=comm.device)
        self._lock = threading.Lock()
        self._no_sync_depth = 0
        self._is_joined = False
        self.last_active: list[int] = []  # in join(): the ranks that had the last backward
        self._backward: _Backward | None = None
        self._accumulated: set[TrainedParam] = set()  # under no_sync() since the last averages
        self._is_ordered = False  # buckets are in the order in which gradients come
        for trained in params:
            hook = partial(_on_gradient, weakref.ref(self), weakref.ref(trained))
            trained.param.register_post_accumulate_grad_hook(hook)

    def divide(self, stage: int) -> None:
        """Gradients belong to a ShardedAdamW of this stage from now on. Collective in stage 2."""
        self.stage = stage
        flat = self.gradients
        assert isinstance(flat, FlatGradients)
        if stage == 1:
            flat.divide()
        if stage == 2:
            flat.give_back()
            self._comm.barrier()  # every rank has released its part, so the next allocation frees them
            self.gradients = PooledGradients(flat.params, self._comm, self._options, self.step)

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
            if self._running().has_reported:
                self._give_up("a backward was interrupted while it waited for its last bucket")
            self._failed[self._comm.rank] = 1
            self._announce(active=True)
            try:
                self._complete()
            finally:
                self._drop_gradients()

    def gradient_arrived(self, trained: TrainedParam) -> None:
        """Autograd has accumulated into the parameter's ``.grad``."""
        with self._lock:
            self._require_not_interrupted()
            _check_gradient(trained)
            if self._no_sync_depth:
                self.gradients.keep(trained)
                self._accumulated.add(trained)
                return
            backward = self._running()
            if trained in backward.came:
                raise PycommError(
                    f"DataParallel: {trained.name!r} got a gradient twice in one backward (shared between reentrant "
                    "checkpoints?); its bucket may be on its way already. Use checkpoint(..., use_reentrant=False)"
                )
            self.gradients.keep(trained)
            backward.came[trained] = None
            backward.num_missing[trained.bucket_index] -= 1
            if self._options.overlap and not self._is_joined:  # else nothing may be sent before finish()
                try:
                    self._launch(backward, rest=False)
                except PycommError as error:
                    self._explain(error)
                    raise

    def backward_began(self) -> None:
        """Backward has reached an output of forward."""
        with self._lock:
            self._require_not_interrupted()
            self.gradients.before_backward()
            if not self._no_sync_depth:
                self._running()

    def finish(self) -> None:
        """End of backward: reduce what remains and wait."""
        with self._lock:
            backward = self._backward
            if backward is None or not backward.came:
                self._backward = None  # torch.autograd.grad() went through an output; no parameter was asked for
                return
            start = time.perf_counter()
            self._complete_missing(backward)
            self._announce(active=True)
            self._average_together(backward.came)
            self.exposed_comm_s = time.perf_counter() - start

    @contextmanager
    def join(self, after_backward: Callable[[], object]) -> Iterator[None]:
        """After the block, take part in the backwards of the other ranks with gradients of zeros."""
        self._is_joined, self.last_active = True, []
        try:
            yield
            while self._announce(active=False):
                with self._lock:
                    for trained in self.gradients.params:
                        trained.param.grad = None
                        self.gradients.keep(trained)
                    self._backward = _Backward(None, [])
                    self._average_together({})
                after_backward()
        finally:
            self._is_joined = False

    def clear(self) -> None:
        """The gradients were zeroed."""
        self.step.end()
        self.gradients.were_zeroed()
        self._accumulated.clear()

    def were_taken(self) -> None:
        """The optimizer has made its step with the averages."""
        self.gradients.were_taken()
        if self.gradients.packed:
            self.step.end()

    @property
    def in_no_sync(self) -> bool:
        return self._no_sync_depth > 0

    @property
    def is_accumulating(self) -> bool:
        """Whether gradients were accumulated under no_sync() and not averaged since."""
        return any(trained.param.grad is not None for trained in self._accumulated)

    def _running(self) -> _Backward:
        """The running backward, which begins if none is."""
        if self._backward is None:
            # The callback is not kept in a local variable: a traceback that holds this frame would keep it alive.
            num_missing = [len(bucket.params) for bucket in self.gradients.buckets]
            self._backward = _Backward(_queue_at_end_of_backward(self), num_missing)
        return self._backward

    def _is_interrupted(self) -> bool:
        return self._backward is not None and self._backward.end is not None and self._backward.end() is None

    def _require_not_interrupted(self) -> None:
        if self._is_interrupted():
            raise PycommError(
                "DataParallel: an earlier backward ended with an exception; call forward through DataParallel, which "
                "starts again together with the other ranks, before the next backward"
            )

    def _announce(self, *, active: bool) -> bool:
        """In join(): say whether this rank has a backward; returns whether any rank has. Collective."""
        if self._is_joined:
            ranks = [rank for rank, (has_backward,) in enumerate(self._comm.agree([active])) if has_backward]
            self.last_active = ranks or self.last_active
            return bool(ranks)
        return True

    def _launch(self, backward: _Backward, *, rest: bool) -> None:
        """Launch buckets in order: those whose gradients are all there, or all that are left."""
        buckets = self.gradients.buckets
        while backward.num_launched < len(buckets) and (rest or not backward.num_missing[backward.num_launched]):
            backward.num_launched += 1
            self.gradients.launch(buckets[backward.num_launched - 1])

    def _complete(self) -> None:
        """Launch the rest, wait for all, be idle. Idle after an error too: a broken communicator repeats it later."""
        backward = self._running()
        errors: list[PycommError] = []
        is_averaged, report = True, None
        try:
            self._launch(backward, rest=True)
            backward.has_reported = True
            report = self._comm.all_reduce(self._failed, op="max", async_op=self._options.overlap)
        except PycommError as error:
            errors.append(error)
        try:
            is_averaged = self.gradients.wait()
            if report is not None:
                report.wait()
        except PycommError as error:
            errors.insert(0, error)
        self._become_idle()
        if errors:
            self._explain(errors[0])
            raise errors[0]
        self.step.begin(is_averaged=is_averaged)

    def _average_together(self, came: dict[TrainedParam, None]) -> None:
        self._complete()
        self._require_nobody_failed()
        self._reorder(came)

    def _explain(self, error: PycommError) -> None:
        """Add what is nearly always behind it if a rank does not come to this backward."""
        left = isinstance(error, (MismatchError, PeerTimeoutError)) or "exited normally" in str(error)
        if left and not self._is_joined and _JOIN not in str(error):
            error.args = (f"{error}. {_JOIN}", *error.args[1:])

    def _become_idle(self) -> None:
        self._backward = None
        self._accumulated.clear()

    def _complete_missing(self, backward: _Backward) -> None:
        """Put a value where no hook has in this backward, or say that there is none."""
        others = [trained for trained in self.gradients.params if trained not in backward.came]
        missing = [trained for trained in others if not self._has_earlier(trained)]
        if missing and not self._options.find_unused:
            names = ", ".join(repr(trained.name) for trained in missing[:_NUM_NAMED])
            more = f" and {len(missing) - _NUM_NAMED} more" if len(missing) > _NUM_NAMED else ""
            self._give_up(
                f"{len(missing)} parameter(s) got no gradient in this backward: {names}{more}. Use them in the loss, "
                "freeze them with requires_grad_(False) before wrapping, or pass find_unused=True (zeros then)"
            )
        for trained in missing:
            self.gradients.keep(trained)

    def _has_earlier(self, trained: TrainedParam) -> bool:
        """Whether there is a gradient to average from no_sync(), or from the user."""
        grad = trained.param.grad
        if grad is not None and grad is not trained.view:
            self.gradients.keep(trained)
            return True
        return grad is not None and trained in self._accumulated

    def _require_nobody_failed(self) -> None:
        failed = torch.nonzero(self._failed).flatten().tolist()
        if not failed:
            return
        self._drop_gradients()
        raise PycommError(
            f"DataParallel: backward failed on rank(s) {failed}; the gradients of this step, accumulated ones "
            "included, were set to zero on every rank. Skip the step on every rank, or stop"
        )

    def _reorder(self, came: dict[TrainedParam, None]) -> None:
        """After the first synchronising backward: buckets in the order in which rank 0's gradients ``came``."""
        if self._is_ordered:
            return
        self._is_ordered = True
        params = self.gradients.params
        # A gradient that did not come now is expected where the reverse of the model's order has it last.
        order = [*came, *(trained for trained in reversed(params) if trained not in came)]
        message = torch.tensor([trained.index for trained in order], dtype=torch.int64, device=self._comm.device)
        self._comm.broadcast(message, root=0)
        order = [params[index] for index in message.tolist()]
        if order != [trained for bucket in self.gradients.buckets for trained in bucket.params]:
            self.gradients.reorder(order)

    def _give_up(self, reason: str) -> NoReturn:
        """Tell the peers, which wait for this rank, and raise."""
        self._become_idle()
        self._comm.abort(f"DataParallel: {reason}")
        raise PycommError(f"DataParallel on rank {self._comm.rank}: {reason}")

    def _drop_gradients(self) -> None:
        self._failed.zero_()
        self.gradients.drop()
        self.step.end()


def _queue_at_end_of_backward(engine: GradientEngine) -> "weakref.ref[partial[None]]":
    """The callback that autograd runs at the end of a backward, and drops if the backward raises."""
    end = partial(GradientEngine.finish, engine)
    Variable._execution_engine.queue_callback(end)
    return weakref.ref(end)


def _check_gradient(trained: TrainedParam) -> None:
    grad = trained.param.grad
    if grad is None:
        raise PycommError(f"DataParallel: a hook registered before wrapping took the gradient of {trained.name!r} away")
    if grad.layout != torch.strided:
        name = trained.name
        raise PycommError(f"DataParallel: the gradient of {name!r} is sparse; build its layer with sparse=False")
    if grad.requires_grad:
        raise PycommError(
            "DataParallel: backward(create_graph=True) is not possible, since averaging is no part of the graph; "
            "torch.autograd.grad(..., create_graph=True) followed by backward() is"
        )


def is_averaged(trained: nn.Parameter) -> bool:
    """Whether a wrapper that is in use averages the parameter's gradient already."""
    hooks: dict[int, object] = trained._post_accumulate_grad_hooks or {}
    return any(
        isinstance(hook, partial) and hook.func is _on_gradient and hook.args[0]() is not None
        for hook in hooks.values()
    )


# Hooks live as long as the parameters. They hold no strong reference, so that a wrapper that is gone frees its buckets
# and leaves a plain module behind.
def _on_gradient(engine: "weakref.ref[GradientEngine]", trained: "weakref.ref[TrainedParam]", _: Tensor) -> None:
    live_engine, live_param = engine(), trained()
    if live_engine is not None and live_param is not None:
        live_engine.gradient_arrived(live_param)


def _on_output(engine: "weakref.ref[GradientEngine]", _grad: Tensor) -> None:
    live_engine = engine()
    if live_engine is not None:
        live_engine.backward_began()
