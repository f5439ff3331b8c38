"""Parameters that several stages have in common, such as the embedding that is also the output projection.

Each of their ranks has a copy. Copies start equal, get the sum of all gradients after every step, and so stay equal
under any optimizer that treats them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycomm.backends.agreement import digest
from pycomm.communicator import Communicator
from pycomm.errors import MismatchError
from pycomm.pipeline.stage import PipelineStage

__all__ = ["SharedParameters"]

Part = tuple[int, Tensor]


class SharedParameters:
    """All shared parameters of this rank's stages. Building it is collective: values become those of the first rank.

    Copies but the first one get the attribute ``is_counted_elsewhere``, for the norm of the gradients.

    Raises:
        MismatchError: copies differ in shape or dtype.
    """

    def __init__(self, comm: Communicator, stages: Sequence[PipelineStage]) -> None:
        copies: dict[str, list[_Copy]] = {}
        for stage in stages:
            for name, param in stage.shared.items():
                if not any(param is other.param for other in copies.setdefault(name, [])):
                    copies[name].append(_Copy(param, stage.module))
        self._groups: list[tuple[Communicator, list[_Copy]]] = []
        mine = {digest(name): found for name, found in copies.items()}
        for number in _all_numbers(comm, sorted(mine)):
            group = comm.split(0 if number in mine else None)
            if group is not None:
                _make_equal(group, [copy.param for copy in mine[number]])
                self._groups.append((group, mine[number]))
                for copy in mine[number] if group.rank else mine[number][1:]:
                    copy.param.is_counted_elsewhere = True  # type: ignore[attr-defined]

    def begin_step(self) -> None:
        """Let one copy alone keep what it has from earlier steps, the same in all, so that it counts once."""
        for group, copies in self._groups:
            for copy in copies if group.rank else copies[1:]:
                for _, part in copy.gradient_parts():
                    part.zero_()

    def end_step(self) -> None:
        """Give every copy the sum over all copies. Collective among those who have one."""
        for group, copies in self._groups:
            parts = [copy.gradient_parts(make=True) for copy in copies]
            _check_parts(group, parts)
            for same in zip(*parts, strict=True):
                grads = [grad for _, grad in same]
                total = grads[0]
                for grad in grads[1:]:
                    total += grad
                group.all_reduce(total)
                for grad in grads[1:]:
                    grad.copy_(total)


@dataclass
class _Copy:
    """A shared parameter in one stage."""

    param: nn.Parameter
    module: nn.Module

    @torch.no_grad()
    def gradient_parts(self, *, make: bool = False) -> list[Part]:
        """Where in the parameter, and what, as :meth:`pycomm.DataParallel.gradient_parts`.

        Args:
            make: zeros if there is none yet.
        """
        of_wrapper = getattr(self.module, "gradient_parts", None)
        if of_wrapper is not None:
            parts: list[Part] = of_wrapper(self.param)
            return parts
        if self.param.grad is None:
            if not make:
                return []
            self.param.grad = torch.zeros_like(self.param)
        elif not self.param.grad.is_contiguous():
            self.param.grad = self.param.grad.contiguous()
        return [(0, self.param.grad)]


def _check_parts(group: Communicator, parts: Sequence[Sequence[Part]]) -> None:
    """Otherwise sums would be of different elements."""
    cuts = {tuple((start, grad.numel()) for start, grad in of_copy) for of_copy in parts}
    rows = group.agree([digest(str(sorted(cuts)))])
    if len(cuts) > 1 or any(row != rows[0] for row in rows):
        raise MismatchError(
            f"the copies of a shared parameter have different shards of its gradient, here {sorted(cuts)}: train all "
            "stages in one way, and give the copies one number as their attribute shard_turn before they are wrapped"
        )


def _make_equal(group: Communicator, params: Sequence[nn.Parameter]) -> None:
    text = f"{params[0].dtype} {list(params[0].shape)}"
    rows = group.agree([digest(text)])
    if any(row != rows[0] for row in rows) or any(param.shape != params[0].shape for param in params):
        raise MismatchError(f"copies of a shared parameter differ; this rank's is {text}")
    with torch.no_grad():
        value = params[0].detach().contiguous()
        group.broadcast(value, root=0)
        for param in params:
            param.copy_(value)


def _all_numbers(comm: Communicator, mine: list[int]) -> list[int]:
    """The numbers of all ranks' shared parameters, in one order. Collective."""
    most = max(count for (count,) in comm.agree([len(mine)]))
    rows = comm.agree(mine + [0] * (most - len(mine)))  # 0 is no digest
    return sorted({number for row in rows for number in row} - {0})
