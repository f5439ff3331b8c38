"""Parameters that several stages have in common, such as the embedding that is also the output projection.

Each of their ranks has a copy. Copies start equal, get the sum of all gradients after every step, and so stay equal
under any optimizer that treats them alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pycomm.communicator import Communicator
from pycomm.errors import MismatchError
from pycomm.pipeline.stage import PipelineStage

__all__ = ["SharedParameters"]

_DIGEST_BYTES = 7  # a positive int64


class SharedParameters:
    """All shared parameters of this rank's stages. Building it is collective: values become those of the first rank.

    Raises:
        MismatchError: copies differ in shape or dtype.
    """

    def __init__(self, comm: Communicator, stages: Sequence[PipelineStage]) -> None:
        copies: dict[str, list[nn.Parameter]] = {}
        for stage in stages:
            for name, param in stage.shared.items():
                if not any(param is other for other in copies.setdefault(name, [])):
                    copies[name].append(param)
        self._groups: list[tuple[Communicator, list[nn.Parameter]]] = []
        mine = {_number(name): params for name, params in copies.items()}
        for number in _all_numbers(comm, sorted(mine)):
            group = comm.split(0 if number in mine else None)
            if group is not None:
                self._make_equal(group, mine[number])
                self._groups.append((group, mine[number]))

    def begin_step(self) -> None:
        """Let one copy alone keep what ``.grad`` has from earlier steps, the same in all, so that it counts once."""
        for group, params in self._groups:
            for param in params if group.rank else params[1:]:
                if param.grad is not None:
                    param.grad.zero_()

    def end_step(self) -> None:
        """Give every copy the sum over all copies. Collective among those who have one."""
        for group, params in self._groups:
            grads = [_gradient(param) for param in params]
            total = grads[0]
            for grad in grads[1:]:
                total += grad
            group.all_reduce(total)
            for grad in grads[1:]:
                grad.copy_(total)

    @staticmethod
    def _make_equal(group: Communicator, params: list[nn.Parameter]) -> None:
        text = f"{params[0].dtype} {list(params[0].shape)}"
        numbers = torch.empty(group.world_size, dtype=torch.int64, device=group.device)
        group.all_gather(numbers, torch.tensor([_number(text)], device=group.device))
        if len(set(numbers.tolist())) > 1 or any(param.shape != params[0].shape for param in params):
            raise MismatchError(f"copies of a shared parameter differ; this rank's is {text}")
        with torch.no_grad():
            value = params[0].detach().contiguous()
            group.broadcast(value, root=0)
            for param in params:
                param.copy_(value)


def _gradient(param: nn.Parameter) -> Tensor:
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    elif not param.grad.is_contiguous():
        param.grad = param.grad.contiguous()
    return param.grad


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=_DIGEST_BYTES).digest(), "little")


def _all_numbers(comm: Communicator, mine: list[int]) -> list[int]:
    """The numbers of all ranks' shared parameters, in one order. Collective."""
    counts = torch.empty(comm.world_size, dtype=torch.int64, device=comm.device)
    comm.all_gather(counts, torch.tensor([len(mine)], device=comm.device))
    numbers = torch.empty(int(counts.sum()), dtype=torch.int64, device=comm.device)
    own = torch.tensor(mine, dtype=torch.int64, device=comm.device)
    comm.all_gather(numbers, own, output_splits=counts.tolist())
    return sorted(set(numbers.tolist()))
