"""Optimizer states in a torch.distributed.checkpoint, each rank writing and reading its own shard.

The checkpoint has every state as one flat tensor [elements of the parameter, in the order of its memory], cut into the
ranks' shards. torch finds out which pieces of which files another world size needs.

Ref: torch.distributed.checkpoint, whose planner asks a tensor for its chunks if it has such methods, as DTensor does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from pycomm.data_parallel.layout import Shard, TrainedParam

if TYPE_CHECKING:
    from pycomm.data_parallel.sharded_adamw import ShardedAdamW


class ShardedStates:
    """The states of a :class:`pycomm.ShardedAdamW` as torch.distributed.checkpoint takes them: a ``Stateful``.

    ``dcp.save({"optimizer": optimizer.sharded_states()}, ...)`` on every rank, and ``dcp.load`` likewise, into an
    optimizer of any world size and stage over a model of the same names. Load the model's parameters before.
    """

    def __init__(self, optimizer: ShardedAdamW) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Views of this rank's states by the parameters' names, the number of steps, and the groups. Local."""
        states: dict[str, dict[str, Tensor]] = {}
        for trained, shard, tensors in self._optimizer.shards():
            states[trained.name] = {name: _chunk(packed, trained, shard) for name, packed in tensors.items()}
        return {"states": states, "num_steps": self._optimizer.num_steps, "groups": self._groups()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the number of steps and the groups; the states were read into the memory that state_dict() gave.

        Raises:
            ValueError: the checkpoint has another number of parameter groups.
        """
        self._optimizer.states_were_read(int(state_dict["num_steps"]), list(state_dict["groups"].values()))

    def _groups(self) -> dict[str, dict[str, Any]]:
        return {
            str(number): {key: value for key, value in group.items() if key != "params"}
            for number, group in enumerate(self._optimizer.param_groups)
        }


class _Chunk(Tensor):
    """[elements] of the flat tensor ``numel`` long, from ``begin`` on; shares the memory of the states."""

    begin: int
    numel_of_all: int

    def size(self, dim: int | None = None) -> Any:
        """Of the whole flat tensor, which is what a reader compares with the checkpoint."""
        return torch.Size([self.numel_of_all]) if dim is None else self.numel_of_all

    def _place(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.begin]), torch.Size([self.numel()]))

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if self.numel() == 0:
            return []
        data = TensorWriteData(
            chunk=self._place(),
            properties=TensorProperties.create_from_tensor(self.as_subclass(Tensor)),
            size=torch.Size([self.numel_of_all]),
        )
        index = MetadataIndex(name, torch.Size([self.begin]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._place()] if self.numel() > 0 else []

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.as_subclass(Tensor)


def _chunk(packed: Tensor, trained: TrainedParam, shard: Shard) -> Tensor:
    chunk = shard.of(packed).as_subclass(_Chunk)
    chunk.begin = shard.begin
    chunk.numel_of_all = trained.param.numel()
    return chunk
