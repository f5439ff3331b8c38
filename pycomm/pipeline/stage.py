"""PipelineStage: one part of the model, and what it keeps of each micro-batch between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycomm.annotations import check_types
from pycomm.communicator import Communicator
from pycomm.pipeline.backward import Leaves, SplitBackward, leaves_of
from pycomm.pipeline.links import check_sendable

__all__ = ["PipelineStage"]


@dataclass
class _Held:
    """A micro-batch between its F and its last B or W."""

    stage_input: Tensor
    # Of the last stage: the weighted loss. None where nothing needs a gradient, or B needs it no more.
    output: Tensor | None
    output_grad: Tensor | None = None
    split: SplitBackward | None = None


class PipelineStage:
    """Stage ``stage_index`` of ``num_stages``.

    Args:
        module: takes one tensor and returns one, the last stage's whatever the loss takes. It must not change its input
            in place. A wrapper with ``no_sync()``, such as DataParallel, communicates on the last micro-batch only;
            one whose ``averages_every_backward`` is true, on each.
        stage_index: its place in the model.
        num_stages: parts of the model.
        comm: the ranks of this pipeline.
        shared: name -> parameter. Parameters of several stages under one name are one parameter, such as tied
            embeddings: their values are made equal when the Pipeline is built, their gradients summed after each step.

    Raises:
        ValueError: ``stage_index`` is out of range, or a shared parameter is not the module's.
    """

    @check_types()
    def __init__(
        self,
        module: nn.Module,
        stage_index: int,
        num_stages: int,
        comm: Communicator,
        *,
        shared: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        if not 0 <= stage_index < num_stages:
            raise ValueError(f"stage_index is {stage_index}: it is between 0 and num_stages - 1 = {num_stages - 1}")
        self.module = module
        self.stage_index = stage_index
        self.num_stages = num_stages
        self.comm = comm
        self.shared = dict(shared or {})
        own = {id(param) for param in module.parameters()}
        for name, param in self.shared.items():
            if id(param) not in own:
                raise ValueError(f"the shared parameter {name!r} is not a parameter of stage {stage_index}'s module")
        self._held: dict[int, _Held] = {}
        self._leaves: Leaves | None = None  # of a step

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    def forward(self, microbatch: int, stage_input: Tensor, loss_of: Callable[[Tensor], Tensor] | None) -> Tensor:
        """F, with ``loss_of`` on top in the last stage. Keeps what backward needs, unless gradients are off.

        Returns:
            The output, or the loss; part of this stage's graph.
        """
        if not self.is_first:
            stage_input = stage_input.detach()
            if torch.is_grad_enabled() and stage_input.is_floating_point():
                stage_input.requires_grad_()
        output: Tensor = self.module(stage_input)
        if loss_of is not None:
            output = loss_of(output)
        else:
            check_sendable(output, f"the output of stage {self.stage_index}, micro-batch {microbatch},")
        if not self.is_first and _same_memory(output, stage_input):
            output = output.clone()  # the input's memory goes back to its sender before the last use of the output
        if torch.is_grad_enabled():
            self._held[microbatch] = _Held(stage_input, output if output.requires_grad else None)
        return output

    def backward_input(self, microbatch: int, output_grad: Tensor | None, is_last: bool) -> Tensor | None:
        """B: the input's gradient; None in the first stage.

        Args:
            is_last: no micro-batch comes after this one in this stage.
        """
        held = self._held[microbatch]
        held.output_grad = output_grad
        wanted = None if self.is_first or not held.stage_input.requires_grad else held.stage_input
        if held.output is None:
            return self._for_previous(None, held)
        grad: Tensor | None = None
        if self._averages_always:
            # The wrapper's hooks take the weights' gradients as they come, so W would be a second backward.
            torch.autograd.backward([held.output], _listed(output_grad))
            held.output = None
            return self._for_previous(held.stage_input.grad, held)
        with self._no_sync():
            if is_last and self._communicates:
                # W of this one is a whole backward, since only that runs the hooks of the wrapper.
                if wanted is not None:
                    grads = _listed(output_grad)
                    grad = torch.autograd.grad([held.output], [wanted], grads, retain_graph=True, allow_unused=True)[0]
            else:
                held.split = SplitBackward(held.output, self._gradients_of())
                held.output = None  # what W does not need of its graph goes while B runs
                grad = held.split.inputs(output_grad, wanted)
        return self._for_previous(grad, held)

    def backward_weight(self, microbatch: int) -> None:
        """W: what :meth:`backward_input` left; then nothing of the micro-batch is kept."""
        held = self._held.pop(microbatch)
        if held.split is not None:
            with self._no_sync():
                held.split.weights()
        elif held.output is not None:
            params = [param for param in self.module.parameters() if param.requires_grad]
            torch.autograd.backward([held.output], _listed(held.output_grad), inputs=params)
        self._own_gradients(held.output_grad)

    def backward(self, microbatch: int, output_grad: Tensor | None, is_last: bool) -> Tensor | None:
        """B and W in one; then nothing of the micro-batch is kept."""
        held = self._held.pop(microbatch)
        held.output_grad = output_grad
        if held.output is None:
            return self._for_previous(None, held)
        with nullcontext() if is_last or self._averages_always else self._no_sync():
            torch.autograd.backward([held.output], _listed(output_grad))
        self._own_gradients(output_grad)
        return self._for_previous(held.stage_input.grad, held)

    def drop(self) -> None:
        """End of a step: forget all micro-batches."""
        self._held.clear()
        self._leaves = None

    def _gradients_of(self) -> Leaves:
        if self._leaves is None:
            self._leaves = leaves_of(self.module.parameters())
        return self._leaves

    def _for_previous(self, grad: Tensor | None, held: _Held) -> Tensor | None:
        """The input's gradient in memory of its own. The stage before waits for one, if only for zeros."""
        if self.is_first:
            return None
        if grad is None:
            return torch.zeros_like(held.stage_input)
        return grad.clone() if held.output_grad is not None and _same_memory(grad, held.output_grad) else grad

    def _own_gradients(self, output_grad: Tensor | None) -> None:
        """Autograd may make ``.grad`` a view of the gradient that came in, whose memory goes back to its sender."""
        if output_grad is None:
            return
        for param in self.module.parameters():
            if param.grad is not None and _same_memory(param.grad, output_grad):
                param.grad = param.grad.clone()

    @property
    def _communicates(self) -> bool:
        return hasattr(self.module, "no_sync")

    @property
    def _averages_always(self) -> bool:
        return bool(getattr(self.module, "averages_every_backward", False))

    def _no_sync(self) -> AbstractContextManager[None]:
        return self.module.no_sync() if self._communicates else nullcontext()  # type: ignore[operator]


def _listed(grad: Tensor | None) -> list[Tensor] | None:
    return None if grad is None else [grad]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0
