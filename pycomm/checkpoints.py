"""What torch.distributed.checkpoint must not take for the whole: tensors that other ranks have under the same name.

It knows a tensor by its name alone. Where ranks hold different ones of a name (the layers of tensor-parallel ranks, the
stages of pipelines, the shards of optimizers), it keeps one and loses the others without an error. So state dicts hand
such tensors out as a :class:`Part`, and sharded optimizer states are given to the right ranks only.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from pycomm import env

__all__ = ["PER_PLACE", "Part", "are_connected", "num_ranks"]

PER_PLACE = (
    "Save a file for each place on the other axes of the mesh: build state = {'model': ddp.state_dict(), 'optimizer': "
    "optimizer.state_dict(root=0)} on every rank, and where mesh.dp_rank is 0 call torch.save(state, "
    "f'{folder}/pp{mesh.pp_rank}-tp{mesh.tp_rank}.pt')"
)


def are_connected() -> bool:
    """Whether ranks write a checkpoint together: over torch.distributed. Otherwise each writes for itself."""
    return dist.is_available() and dist.is_initialized()


def num_ranks() -> int:
    """Of the job: those of torch.distributed, else those that were launched, as far as this process knows."""
    if are_connected():
        return dist.get_world_size()
    launched = env.launch()
    return 1 if launched is None else launched.world_size


class Part(Tensor):
    """A plain tensor to everybody but torch.distributed.checkpoint, which it refuses.

    What operations, copies and pickles give is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    of: str  # what the tensor is a part of

    @classmethod
    def made_of(cls, tensor: Tensor, of: str) -> Part:
        """``tensor``, whose memory it shares."""
        part = tensor.as_subclass(cls)
        part.of = of
        return part

    def __create_write_items__(self, name: str, _: object) -> NoReturn:
        self._refuse(repr(name))

    def __create_chunk_list__(self) -> NoReturn:
        self._refuse("a tensor")

    def new_empty(self, *_: Any, **__: Any) -> NoReturn:
        """Called by asynchronous savers to copy it."""
        self._refuse("a tensor")

    def _refuse(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"torch.distributed.checkpoint would lose values: {name} of {list(self.shape)} is {self.of}, and other "
            f"ranks have other values under that name. {PER_PLACE}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)
