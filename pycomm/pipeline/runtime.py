"""Pipeline: runs a verified schedule. It knows no schedule by name; it does what the rank's list says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from pycomm.annotations import check_types
from pycomm.backends.agreement import digest
from pycomm.communicator import Communicator
from pycomm.errors import MismatchError, PeerLostError, PeerTimeoutError
from pycomm.pipeline.actions import COMPUTE, KINDS, Action, Schedule, last_uses, steps
from pycomm.pipeline.links import Arrived, Links
from pycomm.pipeline.shared import SharedParameters
from pycomm.pipeline.simulate import Span, Timeline
from pycomm.pipeline.stage import PipelineStage
from pycomm.pipeline.verify import buffers, verify

__all__ = ["Pipeline"]

Loss = Callable[[Tensor, Tensor], Tensor]
Parts = list[Tensor] | None


class Pipeline:
    """Trains a model whose stages are on several ranks. Building it and each call of :meth:`step` are collective.

    Gradients are those of one process with the whole batch, up to the order of summation. They add to what ``.grad``
    has, so that several steps accumulate.

    Args:
        stages: this rank's, a PipelineStage or several.
        schedule: verified here; the same on all ranks.
        loss_fn: (output, target) -> the mean over its micro-batch, a scalar. Used where the last stage is.
        ordered: let transfers block at their place in the schedule, as they do on one stream of NCCL (where they always
            do). False: they wait beside the computation, which is faster where costs are not as even as the schedule
            assumes.

    Raises:
        ScheduleError: the schedule is not sound.
        ValueError: the stages are not those that the schedule puts on this rank.
        MismatchError: ranks have different schedules or shared parameters.
    """

    @check_types(schedule='such as build("1f1b", num_ranks, num_microbatches)')
    def __init__(
        self,
        stages: PipelineStage | Sequence[PipelineStage],
        schedule: Schedule,
        loss_fn: Loss,
        *,
        ordered: bool = False,
    ) -> None:
        stages = [stages] if isinstance(stages, PipelineStage) else list(stages)
        verify(schedule)
        self._comm = _checked_comm(stages, schedule)
        rank = self._comm.rank
        self._stages = {stage.stage_index: stage for stage in stages}
        self._steps = steps(schedule.ranks[rank])
        self._forward_only = steps([action for action in schedule.ranks[rank] if action.kind.endswith("F")])
        self._num_stages = schedule.num_stages
        self._num_microbatches = schedule.num_microbatches
        self._local = {
            stage: stage + 1 < schedule.num_stages and not schedule.crosses(stage) for stage in range(self._num_stages)
        }
        self._loss_fn = loss_fn
        self._release = last_uses(schedule.ranks[rank])
        last = {action.stage: action.key for action in schedule.ranks[rank] if action.kind in ("BW", "W")}
        self._last_backward = {(stage, key[2]) for stage, key in last.items()}
        _check_same(self._comm, schedule)
        # One buffer more than what the order needs at least: a sender may run ahead of it.
        slots = {link: count + 1 for link, count in buffers(schedule).items()}
        self._links = Links(self._comm, schedule.rank_of, slots, ordered)
        self._shared = SharedParameters(self._comm, stages)
        self._spans: list[Span] = []

    def parameters(self) -> list[nn.Parameter]:
        """Those of this rank's stages, each once; for an optimizer."""
        return list(dict.fromkeys(param for stage in self._stages.values() for param in stage.module.parameters()))

    @torch.enable_grad()
    def step(self, inputs: Tensor | None = None, targets: Tensor | None = None) -> Tensor | None:
        """Forward and backward of one batch, cut into micro-batches along dim 0, whose sizes differ by at most one.

        Args:
            inputs: [batch, ...] on the rank of the first stage, else None.
            targets: [batch, ...] on the rank of the last stage, else None.

        Returns:
            On the rank of the last stage the loss, the mean over the batch; else None. Gradients are in ``.grad``.

        Raises:
            ValueError: inputs or targets are missing or too small; nothing was sent.
            PeerLostError, PeerTimeoutError: as of any communication. Any other error in here makes all peers raise
                PeerLostError with its reason.
        """
        parts = self._parts(inputs, targets)
        self._shared.begin_step()
        loss = self._run(self._steps, *parts)
        self._shared.end_step()
        self._links.end_first_step()
        return loss

    @torch.no_grad()
    def evaluate(self, inputs: Tensor | None = None, targets: Tensor | None = None) -> Tensor | None:
        """The loss of a batch, forward only; arguments and result as of :meth:`step`. Collective."""
        return self._run(self._forward_only, *self._parts(inputs, targets))

    def timeline(self) -> Timeline:
        """What every rank did in its last step and when, on one clock; the ranks share a host. Collective."""
        return Timeline(_gather_spans(self._comm, self._spans))

    def _parts(self, inputs: Tensor | None, targets: Tensor | None) -> tuple[Parts, Parts]:
        """The micro-batches that this rank needs."""
        m = self._num_microbatches
        return (
            _split("inputs", inputs, m, 0 in self._stages),
            _split("targets", targets, m, self._num_stages - 1 in self._stages),
        )

    def _run(self, todo: list[tuple[Action, ...]], inputs: Parts, targets: Parts) -> Tensor | None:
        with _Run(self, inputs, targets) as run:
            self._spans = run.spans
            for step in todo:
                run.do(step)
            self._links.settle()
        return run.loss


class _Run:
    """One pass of a rank over its list."""

    def __init__(self, pipeline: Pipeline, inputs: Parts, targets: Parts) -> None:
        self.loss: Tensor | None = None
        self.spans: list[Span] = []
        self._is_computing = False
        self._pipe = pipeline
        self._links = pipeline._links
        self._stages = pipeline._stages
        self._inputs = inputs
        self._targets = targets
        self._num_rows = sum(len(target) for target in targets or ())
        self._rows: dict[int, int] = {}
        self._shapes: dict[tuple[str, int, int], tuple[int, torch.Size, torch.dtype]] = {}
        self._ready: dict[tuple[str, int, int], Tensor] = {}  # made here: for the next stage, here or by SEND
        self._arrived: dict[tuple[str, int, int], Arrived] = {}

    def __enter__(self) -> _Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A wait that failed has told the peers who is at its root; all else they must hear from here.
        if error is not None and (self._is_computing or not isinstance(error, (PeerLostError, PeerTimeoutError))):
            self._pipe._comm.abort(f"Pipeline: {type(error).__name__}: {error}")
        for stage in self._stages.values():
            stage.drop()

    def do(self, step: tuple[Action, ...]) -> None:
        if step[0].kind in COMPUTE:
            self._compute(step[0])
        elif self._links.is_ordered:
            receives = [action for action in step if action.kind.startswith("RECV")]
            sends = [self._outgoing(action) for action in step if action.kind.startswith("SEND")]
            for action, arrived in zip(receives, self._links.send_and_receive(sends, receives), strict=True):
                self._arrived[action.key] = arrived
        else:
            for action in step:
                if action.kind.startswith("SEND"):
                    self._links.send(*self._outgoing(action))
                # A receive is waited for where its tensor is used.

    def _compute(self, action: Action) -> None:
        kind, stage, i = action.key
        given: Tensor | None = None
        if kind == "F":
            given = self._input_of(stage, i)
        elif kind != "W" and stage + 1 < self._pipe._num_stages:
            given = self._take("RECV_B", "B", stage, i)
        start = time.perf_counter()
        self._is_computing = True
        if kind == "F":
            assert given is not None
            self._forward(stage, i, given)
        elif kind == "W":
            self._stages[stage].backward_weight(i)
        else:
            self._backward(kind, stage, i, given)
        self._is_computing = False
        self.spans.append(Span(action, start, time.perf_counter()))
        if action.key in self._pipe._release or not torch.is_grad_enabled():
            for receive in ("RECV_F", "RECV_B"):
                arrived = self._arrived.pop((receive, stage, i), None)
                if arrived is not None:
                    self._links.release(arrived)

    def _input_of(self, stage: int, i: int) -> Tensor:
        if stage == 0:
            assert self._inputs is not None
            stage_input = self._inputs[i]
            self._rows[i] = len(stage_input)
            return stage_input
        return self._take("RECV_F", "F", stage, i)

    def _take(self, receive: str, made: str, stage: int, i: int) -> Tensor:
        """The input of F or backward: made by a neighbour here, or received."""
        neighbour = stage - 1 if made == "F" else stage + 1
        if self._pipe._local[min(stage, neighbour)]:
            return self._ready.pop((made, neighbour, i))
        key = (receive, stage, i)
        if key not in self._arrived:
            self._arrived[key] = self._links.recv(Action(*key))
        arrived = self._arrived[key]
        if arrived.work is not None:
            arrived.work.wait()
        self._rows[i] = arrived.token.rows
        return arrived.tensor

    def _forward(self, stage: int, i: int, stage_input: Tensor) -> None:
        owner = self._stages[stage]
        if not owner.is_last:
            output = owner.forward(i, stage_input, None)
            self._ready["F", stage, i] = self._checked("F", stage, i, output)
            return
        assert self._targets is not None
        target = self._targets[i]
        if len(target) != self._rows[i]:
            raise ValueError(f"micro-batch {i} has {self._rows[i]} rows of inputs and {len(target)} of targets")
        weight = len(target) / self._num_rows

        def weighted_loss(output: Tensor) -> Tensor:
            loss = self._pipe._loss_fn(output, target)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError("loss_fn must return one number, the mean over the micro-batch")
            return loss * weight

        loss = owner.forward(i, stage_input, weighted_loss).detach()
        self.loss = loss if self.loss is None else self.loss + loss

    def _backward(self, kind: str, stage: int, i: int, grad: Tensor | None) -> None:
        owner = self._stages[stage]
        backward = owner.backward if kind == "BW" else owner.backward_input
        input_grad = backward(i, grad, (stage, i) in self._pipe._last_backward)
        if stage > 0:
            assert input_grad is not None
            self._ready["B", stage, i] = self._checked("B", stage, i, input_grad)

    def _outgoing(self, action: Action) -> tuple[Action, Tensor, int]:
        kind, stage, i = action.key
        tensor = self._ready.pop((kind[-1], stage, i)).detach()
        return action, tensor, self._rows[i]

    def _checked(self, kind: str, stage: int, i: int, tensor: Tensor) -> Tensor:
        """``tensor``, if its shape is that of the other micro-batches with as many rows."""
        what = f"the {'output' if kind == 'F' else 'input gradient'} of stage {stage}, micro-batch {i},"
        first, shape, dtype = self._shapes.setdefault((kind, stage, self._rows[i]), (i, tensor.shape, tensor.dtype))
        if (shape, dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{what} is {tensor.dtype} {list(tensor.shape)}, that of micro-batch {first} with as many rows was "
                f"{dtype} {list(shape)}: a stage keeps one shape in a step"
            )
        return tensor


def _split(name: str, batch: Tensor | None, m: int, needed: bool) -> Parts:
    if not needed:
        return None
    if not isinstance(batch, Tensor):
        raise ValueError(f"{name} are needed on this rank: it has the {'first' if name == 'inputs' else 'last'} stage")
    if batch.ndim == 0 or len(batch) < m:
        rows = len(batch) if batch.ndim else 0
        raise ValueError(f"{name} have {rows} rows: too few for {m} micro-batches")
    return list(batch.tensor_split(m))


def _checked_comm(stages: Sequence[PipelineStage], schedule: Schedule) -> Communicator:
    if not stages:
        raise ValueError("this rank has no stage: every rank of a pipeline has at least one")
    comm = stages[0].comm
    seen: dict[nn.Parameter, int] = {}
    for stage in stages:
        for param in stage.module.parameters() if hasattr(stage.module, "no_sync") else ():
            if seen.setdefault(param, stage.stage_index) != stage.stage_index:
                raise ValueError(
                    f"stages {seen[param]} and {stage.stage_index} are wrapped and have a parameter in common: give "
                    "each a copy, and both copies one name in `shared`"
                )
    if any(stage.comm is not comm for stage in stages):
        raise ValueError("the stages have different communicators: a pipeline has one")
    if len(schedule.ranks) != comm.world_size:
        raise ValueError(f"the schedule is for {len(schedule.ranks)} rank(s), the communicator has {comm.world_size}")
    wrong = next((stage.num_stages for stage in stages if stage.num_stages != schedule.num_stages), None)
    if wrong is not None:
        raise ValueError(f"the stages are of a model of {wrong}, the schedule has {schedule.num_stages}")
    given = sorted(stage.stage_index for stage in stages)
    expected = [stage for stage, rank in enumerate(schedule.rank_of) if rank == comm.rank]
    if given != expected:
        raise ValueError(f"the schedule puts stages {expected} on rank {comm.rank}, given are {given}")
    return comm


def _check_same(comm: Communicator, schedule: Schedule) -> None:
    text = repr((schedule.ranks, schedule.rank_of, schedule.num_microbatches))
    rows = comm.agree([digest(text)])
    odd = [rank for rank, row in enumerate(rows) if row != rows[0]]
    if odd:
        raise MismatchError(f"the ranks have different schedules: rank(s) {odd} another than rank 0")


def _gather_spans(comm: Communicator, spans: Sequence[Span]) -> list[list[Span]]:
    """Every rank's spans, by rank. Collective; only times of one host are on one clock."""
    counts = [count for (count,) in comm.agree([len(spans)])]
    rows = [[KINDS.index(s.action.kind), s.action.stage, s.action.microbatch, s.start, s.end] for s in spans]
    mine = torch.tensor(rows, dtype=torch.float64, device=comm.device).view(-1, 5)
    table = torch.empty(sum(counts), 5, dtype=torch.float64, device=comm.device)
    comm.all_gather(table, mine, output_splits=counts)
    return [
        [Span(Action(KINDS[int(kind)], int(stage), int(i)), start, end) for kind, stage, i, start, end in part.tolist()]
        for part in table.split(counts)
    ]
