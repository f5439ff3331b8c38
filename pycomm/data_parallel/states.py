"""The states of an AdamW for the parameters of one family: this rank's shards of them, and where everything lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm import _C
from pycomm.communicator import Communicator
from pycomm.data_parallel.bucket import Family, Slot
from pycomm.data_parallel.flat import FlatGradients
from pycomm.data_parallel.gradients import Gradients
from pycomm.data_parallel.pooled import PooledGradients
from pycomm.data_parallel.shards import Shard, owned, row
from pycomm.fused import AdamWScalars, dtype_name


class FamilyState:
    """Moves the family's parameters into one flat buffer, symmetric where peers write it, and holds fp32 states.

    ``tensors`` has "exp_avg", "exp_avg_sq" and, for 16-bit parameters, "master": each [elements that this rank owns].
    """

    def __init__(
        self, family: Family, comm: Communicator, gradients: Gradients, group_of: Sequence[int], stage: int
    ) -> None:
        self.family = family
        self._comm = comm
        self._gradients = gradients
        self._is_divided = stage > 0 and comm.world_size > 1
        self._pushes = self._is_divided and gradients.fused
        self._shards = self._shards_of(comm.rank)
        self._groups = group_of
        numel = max(1, family.numel)
        self._flat = (
            comm.empty(numel, dtype=family.param_dtype)
            if self._pushes
            else torch.empty(numel, dtype=family.param_dtype)
        )
        self._flat.zero_()  # the gaps
        for slot in family.slots:
            view = slot.view_in(self._flat, slot.start)
            view.copy_(slot.param.detach())
            slot.param.data = view
        num_owned = self._shards[-1].packed + len(self._shards[-1])
        self.tensors = {name: torch.zeros(num_owned) for name in ("exp_avg", "exp_avg_sq")}
        if family.has_master:
            self.tensors["master"] = torch.zeros(num_owned)
            self._take_values()
        self._versions = self._current_versions()
        self._update: _C.ParameterUpdate | None = None  # what a step reads and writes
        self._layout = 0  # of the gradients that it describes

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def update(self, scalars: Sequence[AdamWScalars]) -> None:
        """One step: then every rank has the new parameters. Collective where states are divided."""
        if self.family.has_master and self._versions != self._current_versions():
            self._take_values()  # somebody has loaded other values
        if self._update is None or self._layout != self._gradients.layout:
            self._update, self._layout = self._describe(), self._gradients.layout
        if self._pushes:
            self._comm.update_parameters(self._update, scalars, reduce_first=self._gradients.unreduced)
        else:
            _C.update_locally(self._update, scalars)
            if self._is_divided:
                self._gather(self._flat)
        self._versions = self._current_versions()

    def whole(self, root: int | None = None) -> dict[Slot, dict[str, Tensor]]:
        """Every parameter's states, whole and in its shape. Collective where states are divided.

        Args:
            root: the only rank that gets them; the others hold one whole state of one parameter at a time.
        """
        result: dict[Slot, dict[str, Tensor]] = {slot: {} for slot in self.family.slots}
        for slot, shard in self.shards():
            for name, packed in self.tensors.items():
                value = self._joined(slot, packed[shard.packed : shard.packed + len(shard)])
                if root in (None, self._comm.rank):
                    result[slot][name] = value
        return result

    def load(self, entries: Mapping[Slot, Mapping[str, Any] | None]) -> None:
        """Take this rank's part of whole states; None: as at the beginning."""
        self._take_values()
        for slot, shard in zip(self.family.slots, self._shards, strict=True):
            entry = entries[slot]
            for name, packed in self.tensors.items():
                mine = packed[shard.packed : shard.packed + len(shard)]
                if entry is not None and name in entry:
                    value = entry[name]
                    if value.shape != slot.param.shape:
                        raise ValueError(
                            f"{name} of {slot.name!r} is {list(value.shape)}, not {list(slot.param.shape)}"
                        )
                    mine.copy_(slot.in_memory_order(value)[shard.begin : shard.end])
                elif name != "master":
                    mine.zero_()

    def were_read(self) -> None:
        """``tensors`` have other values, which belong to the parameters as they are now."""
        self._versions = self._current_versions()

    def shards(self) -> Iterator[tuple[Slot, Shard]]:
        return zip(self.family.slots, self._shards, strict=True)

    def _shards_of(self, rank: int) -> list[Shard]:
        shards: list[Shard] = []
        packed = 0
        for slot in self.family.slots:
            begin, end = 0, slot.param.numel()
            if self._is_divided:
                begin, end = owned(end, slot.turn, rank, self._comm.world_size)
            shards.append(Shard(begin, end, packed))
            packed += end - begin
        return shards

    def _joined(self, slot: Slot, mine: Tensor) -> Tensor:
        """One parameter's state from the shards of all ranks, in the parameter's shape."""
        flat = mine.clone()
        if self._is_divided and slot.param.numel() > 0:
            ranks = range(self._comm.world_size)
            places = [owned(slot.param.numel(), slot.turn, rank, self._comm.world_size) for rank in ranks]
            counts = [end - begin for begin, end in places]
            received = torch.empty(slot.param.numel())
            self._comm.all_gather(received, mine, output_splits=counts)
            flat = torch.empty_like(received)
            for (begin, end), part in zip(places, received.split(counts), strict=True):
                flat[begin:end] = part
        return slot.view_in(flat, 0)

    def _part(self, flat: Tensor, slot: Slot, shard: Shard) -> Tensor:
        return flat[slot.start + shard.begin : slot.start + shard.end]

    def _take_values(self) -> None:
        """fp32 values from 16-bit parameters, where they are not the ones behind them already."""
        if not self.family.has_master:
            return
        master = self.tensors["master"]
        for slot, shard in self.shards():
            mine = master[shard.packed : shard.packed + len(shard)]
            values = self._part(self._flat, slot, shard)
            mine.copy_(torch.where(mine.to(values.dtype) == values, mine, values.float()))

    def _current_versions(self) -> list[int]:
        return [slot.param._version for slot in self.family.slots]

    def _gradient(self) -> Tensor:
        """What the family's averages are read from."""
        gradients = self._gradients
        if isinstance(gradients, FlatGradients):
            return gradients.flats[self.family]
        assert isinstance(gradients, PooledGradients)
        return gradients.shards[self.family]

    def _describe(self) -> _C.ParameterUpdate:
        gradients = self._gradients
        is_flat = isinstance(gradients, FlatGradients)
        rows = []
        for (slot, shard), group in zip(self.shards(), self._groups, strict=True):
            if len(shard) > 0:
                start = gradients.start(slot) if isinstance(gradients, FlatGradients) else 0
                rows.append(row(shard, slot.first_block, grad=start, param=slot.start, group=group))
        grads = self._gradient()
        return _C.ParameterUpdate(
            grads=grads.data_ptr(),
            grad_dtype=dtype_name(grads.dtype),
            grads_packed=not is_flat,
            params=self._flat.data_ptr(),
            count=self._flat.numel(),
            param_dtype=dtype_name(self._flat.dtype),
            master=self.tensors["master"].data_ptr() if self.family.has_master else 0,
            exp_avg=self.tensors["exp_avg"].data_ptr(),
            exp_avg_sq=self.tensors["exp_avg_sq"].data_ptr(),
            runs=_C.Runs(rows),
        )

    def _gather(self, flat: Tensor) -> None:
        """Fill every rank's ``flat`` with the parts that the others own. Collective."""
        by_rank = [self._shards_of(rank) for rank in range(self._comm.world_size)]
        slots = self.family.slots
        parts = [
            [self._part(flat, slot, shard) for slot, shard in zip(slots, shards, strict=True)] for shards in by_rank
        ]
        counts = [sum(map(len, part)) for part in parts]
        received = torch.empty(sum(counts), dtype=flat.dtype)
        self._comm.all_gather(received, torch.cat(parts[self._comm.rank]), output_splits=counts)
        for part, values in zip(parts, received.split(counts), strict=True):
            for target, value in zip(part, values.split([len(t) for t in part]), strict=True):
                target.copy_(value)
