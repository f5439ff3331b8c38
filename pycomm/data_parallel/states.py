"""The states of an AdamW for the parameters of one family: this rank's shards of them, and where everything lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm import _C
from pycomm.communicator import Communicator
from pycomm.data_parallel.gradients import Gradients
from pycomm.data_parallel.layout import Family, Shard, TrainedParam, owned
from pycomm.fused import AdamWScalars, dtype_name


class FamilyState:
    """Moves the family's parameters into one flat buffer, symmetric where peers write it, and holds fp32 states.

    ``tensors`` has "exp_avg", "exp_avg_sq" and, for 16-bit parameters, "master": each [elements that this rank owns].
    """

    def __init__(
        self, family: Family, comm: Communicator, gradients: Gradients, group_of: Mapping[int, int], stage: int
    ) -> None:
        self.family = family
        self._comm = comm
        self._gradients = gradients
        self._group_of = group_of
        self._is_divided = stage > 0 and comm.world_size > 1
        self._one_pass = self._is_divided and gradients.one_pass
        self._shards = {param: param.shard for param in family.params}
        num_owned = family.num_owned
        if not self._is_divided:
            num_owned = 0
            for param in family.params:
                self._shards[param] = Shard(0, param.param.numel(), num_owned)
                num_owned += param.param.numel()
        numel, dtype = max(1, family.numel), family.param_dtype
        self._flat = comm.empty(numel, dtype=dtype) if self._one_pass else torch.empty(numel, dtype=dtype)
        self._flat.zero_()  # the gaps
        for param in family.params:
            view = param.view_in(self._flat, param.start)
            view.copy_(param.param.detach())
            param.param.data = view
        names = ("exp_avg", "exp_avg_sq", *(("master",) if family.has_master else ()))
        self.tensors = {name: torch.zeros(num_owned) for name in names}
        self._take_values()
        self._versions = self._current_versions()
        self._update: _C.ParameterUpdate | None = None  # what a step reads and writes
        self._layout = 0  # of the gradients that it describes

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def update(self, scalars: Sequence[AdamWScalars], *, is_averaged: bool) -> None:
        """One step: then every rank has the new parameters. Collective where states are divided.

        Args:
            is_averaged: the gradients; if not, they are averaged on the way.
        """
        if self.family.has_master and self._versions != self._current_versions():
            self._take_values()  # somebody has loaded other values
        if self._update is None or self._layout != self._gradients.layout:
            self._update, self._layout = self._describe(), self._gradients.layout
        if self._one_pass:
            self._comm.update_parameters(self._update, scalars, reduce_first=not is_averaged)
        else:
            _C.update_locally(self._update, scalars)
            if self._is_divided:
                self._gather_parameters()
        self._versions = self._current_versions()

    def whole(self, root: int | None = None) -> dict[TrainedParam, dict[str, Tensor]]:
        """Every parameter's states, whole and in its shape. Collective where states are divided.

        Args:
            root: the only rank that gets them; the others hold one whole state of one parameter at a time.
        """
        result: dict[TrainedParam, dict[str, Tensor]] = {param: {} for param in self.family.params}
        for param, shard in self.shards():
            for name, packed in self.tensors.items():
                flat = torch.empty(param.param.numel())
                for _, elements, values in self._of_all_ranks([param], shard.of(packed)):
                    flat[elements] = values
                if root in (None, self._comm.rank):
                    result[param][name] = param.view_in(flat, 0)
        return result

    def load(self, entries: Mapping[TrainedParam, Mapping[str, Any] | None]) -> None:
        """Take this rank's part of whole states; None: as at the beginning."""
        self._take_values()
        for param, shard in self.shards():
            entry = entries[param]
            for name, packed in self.tensors.items():
                if entry is not None and name in entry:
                    value = entry[name]
                    if value.shape != param.param.shape:
                        raise ValueError(
                            f"{name} of {param.name!r} is {list(value.shape)}, not {list(param.param.shape)}"
                        )
                    shard.of(packed).copy_(param.in_memory_order(value)[shard.begin : shard.end])
                elif name != "master":
                    shard.of(packed).zero_()

    def were_read(self) -> None:
        """``tensors`` have other values, which belong to the parameters as they are now."""
        self._versions = self._current_versions()

    def shards(self) -> Iterator[tuple[TrainedParam, Shard]]:
        return iter(self._shards.items())

    def _of_all_ranks(
        self, params: Sequence[TrainedParam], mine: Tensor
    ) -> Iterator[tuple[TrainedParam, slice, Tensor]]:
        """What every rank owns of ``params``, of which ``mine`` is this rank's, in order. Collective where divided."""
        if not self._is_divided:
            return iter([(param, slice(0, param.param.numel()), mine) for param in params])
        n = self._comm.world_size
        owners = [[(param, slice(*owned(param.param.numel(), param.turn, r, n))) for param in params] for r in range(n)]
        lengths = [[elements.stop - elements.start for _, elements in of_rank] for of_rank in owners]
        received = torch.empty(sum(map(sum, lengths)), dtype=mine.dtype)
        if received.numel() > 0:
            self._comm.all_gather(received, mine, output_splits=[sum(of_rank) for of_rank in lengths])
        pieces = received.split([length for of_rank in lengths for length in of_rank])
        places = [place for of_rank in owners for place in of_rank]
        return ((*place, piece) for place, piece in zip(places, pieces, strict=True))

    def _take_values(self) -> None:
        """fp32 values from 16-bit parameters, where they are not the ones behind them already."""
        if not self.family.has_master:
            return
        for param, shard in self.shards():
            mine = shard.of(self.tensors["master"])
            values = self._in_buffer(param, slice(shard.begin, shard.end))
            mine.copy_(torch.where(mine.to(values.dtype) == values, mine, values.float()))

    def _in_buffer(self, param: TrainedParam, elements: slice) -> Tensor:
        return self._flat[param.start + elements.start : param.start + elements.stop]

    def _current_versions(self) -> list[int]:
        return [param.param._version for param in self.family.params]

    def _describe(self) -> _C.ParameterUpdate:
        grads, starts = self._gradients.buffers[self.family], self._gradients.starts
        return _C.ParameterUpdate(
            grads=grads.data_ptr(),
            grad_dtype=dtype_name(grads.dtype),
            grads_packed=self._gradients.packed,
            params=self._flat.data_ptr(),
            count=self._flat.numel(),
            param_dtype=dtype_name(self._flat.dtype),
            master=self.tensors["master"].data_ptr() if self.family.has_master else 0,
            exp_avg=self.tensors["exp_avg"].data_ptr(),
            exp_avg_sq=self.tensors["exp_avg_sq"].data_ptr(),
            runs=_C.Runs(
                [
                    param.run(
                        shard, grad=starts.get(param, 0), param=param.start, group=self._group_of[id(param.param)]
                    )
                    for param, shard in self.shards()
                ]
            ),
        )

    def _gather_parameters(self) -> None:
        """Give every rank the parameters that the others have updated. Collective."""
        mine = [self._in_buffer(param, slice(shard.begin, shard.end)) for param, shard in self.shards()]
        for param, elements, values in self._of_all_ranks(self.family.params, torch.cat(mine)):
            self._in_buffer(param, elements).copy_(values)
