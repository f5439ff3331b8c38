"""AdamW whose states, and gradients, are divided over the ranks (ZeRO), in one pass over shared memory.

Every rank owns whole blocks of every parameter (``layout.py``). It updates those in fp32 and writes the new values into
the parameters of all ranks, which lie in symmetric memory.

Ref: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020);
Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycomm import _C
from pycomm.annotations import check_type, check_types
from pycomm.checkpoints import PER_PLACE, are_connected, num_ranks
from pycomm.communicator import Communicator
from pycomm.data_parallel.gradients import Gradients, check_on_host
from pycomm.data_parallel.layout import Family, Shard, TrainedParam, owned
from pycomm.data_parallel.module import DataParallel
from pycomm.data_parallel.replicas import check_same
from pycomm.errors import PycommError
from pycomm.fused import AdamWScalars, dtype_name

if TYPE_CHECKING:
    from pycomm.data_parallel.sharded_states import ShardedStates

_log = logging.getLogger("pycomm")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STAGES = (0, 1, 2)
_NUM_NAMED = 3  # parameters, in an error


class ShardedAdamW(torch.optim.Optimizer):
    """AdamW for the parameters of a :class:`pycomm.DataParallel`; the weights have the same bits in every stage.

    ======  =========================================  ======================================================
    stage   on each of n ranks, bytes a parameter       ``.grad`` after ``backward()``
    ======  =========================================  ======================================================
    0       parameter, gradient, 8 for the states       the average
    1       parameter, gradient, 8/n                    the average in this rank's shard, else local values
    2       parameter, gradient/n, 8/n                  None: this rank's shard is kept elsewhere
    ======  =========================================  ======================================================

    16-bit parameters have fp32 values behind them, which add 4 (or 4/n) bytes. Making one is collective, and so is
    :meth:`step` in stages 1 and 2. Parameters move to new memory (``param.data``), which peers write.

    Clip with :func:`pycomm.clip_grad_norm_`. After a norm that was not finite, ``step`` changes nothing on any rank and
    counts :attr:`num_skipped`. In stage 2, every backward outside ``no_sync()`` is averaged and added to the shards,
    until ``step`` takes them; under ``no_sync()`` gradients stay whole.

    Args:
        ddp: wraps float32, bfloat16 or float16 parameters; belongs to this optimizer from now on.
        stage: 0, 1 or 2.
        param_groups: None: all parameters in one group. Otherwise dictionaries as torch's optimizers take them, with
            "params" and what differs from the arguments; together they have every trainable parameter once.

    Raises:
        ValueError: an argument is out of range, parameters are missing or of another dtype, ``ddp`` has a ShardedAdamW.
        MismatchError: the ranks' arguments or groups differ.
        NotImplementedError: parameters are not on the CPU; nothing was sent.
    """

    @check_types(
        ddp="wrap the module, ddp = pycomm.DataParallel(module, comm), and pass that: ShardedAdamW(ddp, lr=...) "
        "updates all that it trains; groups of parameters go into param_groups=[...]",
        lr="groups of parameters go into param_groups=[...]",
        param_groups='such as [{"params": [...], "weight_decay": 0.0}, ...]',
    )
    def __init__(
        self,
        ddp: DataParallel,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        stage: int = 1,
        *,
        param_groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.num_skipped = 0  # steps left out since the norm was not finite
        self._ddp = ddp
        self._engine = ddp._engine
        self._stage = stage
        self._num_steps = 0
        self._complete = False
        everything = [{"params": [param for param in ddp.parameters() if param.requires_grad]}]
        groups = [dict(group) for group in (everything if param_groups is None else param_groups)]
        for group in groups:
            if "params" not in group:
                raise ValueError(
                    f'a group in param_groups has {sorted(group)}: it needs "params", a list of parameters'
                )
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._complete = True
        group_of = {id(param): number for number, group in enumerate(self.param_groups) for param in group["params"]}
        # In state dicts a parameter has its number in the order of the groups.
        self._number_of = {id(p): at for at, p in enumerate(p for group in self.param_groups for p in group["params"])}
        params = self._engine.gradients.params
        check_on_host(
            "ShardedAdamW",
            ((repr(trained.name), trained.param) for trained in params),
            "torch.optim.AdamW(ddp.parameters()) takes what DataParallel averages there",
        )
        options = f"{stage=} " + " ".join(f"{k}={v}" for g in self.param_groups for k, v in g.items() if k != "params")
        numbers_of_groups = [f"{trained.name!r} in group {group_of.get(id(trained.param))}" for trained in params]
        check_same("make different optimizers", [options, *numbers_of_groups], ddp.comm)
        self._check(stage, group_of)
        self._engine.divide(stage)
        self._states = [
            FamilyState(family, ddp.comm, self._engine.gradients, group_of, stage)
            for family in self._engine.gradients.families
        ]

    @property
    def stage(self) -> int:
        return self._stage

    @property
    def num_steps(self) -> int:
        """Steps made, those before a checkpoint included."""
        return self._num_steps

    @property
    def state_bytes(self) -> int:
        """Memory of optimizer states on this rank: both averages, and fp32 values of 16-bit parameters."""
        return sum(state.num_bytes for state in self._states)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._engine.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, on all ranks, with the averaged gradients. Collective in stages 1 and 2.

        Without gradients since they were zeroed it does nothing, as torch's optimizers.

        Raises:
            PycommError: gradients were accumulated under ``no_sync()`` and not averaged, or some are missing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self._engine
        if engine.is_accumulating:
            raise PycommError(
                "ShardedAdamW: gradients were accumulated under no_sync() and not averaged; let the last backward "
                "before step() run outside of it"
            )
        if not engine.step.has_gradients or not engine.gradients.are_complete():
            return loss
        if engine.step.is_finite:
            self._num_steps += 1
            scalars = [self._scalars(group) for group in self.param_groups]
            for state in self._states:
                state.update(scalars, is_averaged=engine.step.is_averaged)
        else:
            self.num_skipped += 1
            _log.warning("ShardedAdamW: step left out, since the norm of the gradients was not finite")
        engine.were_taken()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are given when the optimizer is made."""
        if self._complete:
            raise ValueError("ShardedAdamW: pass param_groups when making it; groups cannot be added afterwards")
        super().add_param_group(param_group)

    def state_dict(self, root: int | None = None) -> dict[str, Any]:
        """That of torch.optim.AdamW, whole tensors on every rank; 16-bit parameters have "master", too. Collective.

        It loads at any world size and stage, and in torch.optim.AdamW. Its memory is that of unsharded states.

        Args:
            root: the only rank that gets states; elsewhere "state" is empty, and memory that of one parameter's.
        """
        result = super().state_dict()
        has_states = root in (None, self._ddp.comm.rank)
        result["state"] = {
            self._number_of[id(trained.param)]: {"step": torch.tensor(float(self._num_steps)), **tensors}
            for state in self._states
            for trained, tensors in state.whole(root).items()
            if has_states
        }
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take this rank's part of what :meth:`state_dict` gave, here or at another world size or stage. Local.

        Load the model's parameters before.

        Raises:
            ValueError: other groups or parameters, or their numbers of steps differ.
        """
        saved = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != [len(group["params"]) for group in saved]:
            raise ValueError(f"the groups have {sizes} parameters, those saved {[len(g['params']) for g in saved]}")
        keys = [key for group in saved for key in group["params"]]
        entries = {number: state_dict["state"].get(key) for number, key in enumerate(keys)}
        steps = {float(entry["step"]) for entry in state_dict["state"].values()}
        if len(steps) > 1:
            raise ValueError(f"parameters made different numbers of steps, {sorted(steps)}; here they go together")
        for state in self._states:
            state.load({trained: entries[self._number_of[id(trained.param)]] for trained in state.family.params})
        others = [{key: value for key, value in group.items() if key != "params"} for group in saved]
        self.states_were_read(int(steps.pop()) if steps else 0, others)

    def sharded_states(self) -> ShardedStates:
        """For torch.distributed.checkpoint: every rank writes and reads its own states, nothing is gathered.

        Raises:
            PycommError: torch.distributed is not initialised, or has other ranks than ``ddp.comm`` (over a mesh with
                tp or pp above 1): states would be lost, since ranks save different ones under one name.
        """
        self._check_checkpoint_ranks()
        # Here, since importing torch.distributed.checkpoint takes most of a second.
        from pycomm.data_parallel.sharded_states import ShardedStates

        return ShardedStates(self)

    def shards(self) -> Iterator[tuple[TrainedParam, Shard, Mapping[str, Tensor]]]:
        """Every parameter, this rank's part of it, and the packed states in which that part lies."""
        for state in self._states:
            for trained, shard in state.shards.items():
                yield trained, shard, state.tensors

    def states_were_read(self, num_steps: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Somebody has put other states into the memory of :meth:`shards`, which belong to these steps and groups."""
        if len(groups) != len(self.param_groups):
            raise ValueError(f"there are {len(self.param_groups)} parameter groups, those saved are {len(groups)}")
        self._num_steps = num_steps
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)
        for state in self._states:
            state.were_read()

    def _check_checkpoint_ranks(self) -> None:
        own, ranks = self._ddp.comm.world_size, num_ranks()
        if own == ranks and (are_connected() or ranks == 1):
            return
        params = self._engine.gradients.params
        names = ", ".join(repr(trained.name) for trained in params[:_NUM_NAMED]) + (
            ", …" if len(params) > _NUM_NAMED else ""
        )
        if not are_connected():
            raise PycommError(
                "sharded_states: torch.distributed is not initialised, so that all ranks would write one file, and the "
                f"states of {names} would be lost but for one rank's. Call "
                'torch.distributed.init_process_group("pycomm") before, or save state_dict() on one rank'
            )
        raise PycommError(
            f"sharded_states: a checkpoint is written by the {ranks} ranks of torch.distributed, of which {own} have "
            f"these states, so that ranks would write different ones under the names of {names}. {PER_PLACE}"
        )

    def _check(self, stage: int, group_of: Mapping[int, int]) -> None:
        if stage not in _STAGES:
            raise ValueError(f"stage={stage}: it is one of {_STAGES}")
        if self._engine.stage is not None:
            raise ValueError(
                "this DataParallel belongs to a ShardedAdamW already; wrap the module anew for another one"
            )
        for group in self.param_groups:
            _check_group(group)
        params = self._engine.gradients.params
        missing = [trained.name for trained in params if id(trained.param) not in group_of]
        if missing:
            raise ValueError(f"{len(missing)} trainable parameter(s) are in no group, the first is {missing[0]!r}")
        if len(group_of) != len(params):
            raise ValueError("param_groups have parameters that the DataParallel does not train")
        for trained in params:
            if trained.param.dtype not in _DTYPES:
                raise ValueError(
                    f"{trained.name!r} is {trained.param.dtype}; ShardedAdamW takes float32, bfloat16, float16"
                )

    def _scalars(self, group: Mapping[str, Any]) -> AdamWScalars:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        correction1, correction2 = 1 - beta1**self._num_steps, 1 - beta2**self._num_steps
        return (
            self._engine.step.grad_scale,
            1 - lr * group["weight_decay"],
            1 - beta1,
            beta2,
            1 - beta2,
            correction2**0.5,
            group["eps"],
            lr / correction1,
        )


def _check_group(group: Mapping[str, Any]) -> None:
    for name, kind in (("lr", float), ("eps", float), ("weight_decay", float), ("betas", tuple[float, float])):
        check_type(f"ShardedAdamW: {name} of a group", group[name], kind)
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas={group['betas']}: both are at least 0 and less than 1")
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name}={group[name]}: it is a finite number, not negative")
    if not all(isinstance(param, nn.Parameter) for param in group["params"]):
        raise ValueError("param_groups hold parameters of the DataParallel")


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
        self.shards = {trained: trained.shard for trained in family.params}
        num_owned = family.num_owned
        if not self._is_divided:
            num_owned = 0
            for trained in family.params:
                self.shards[trained] = Shard(0, trained.param.numel(), num_owned)
                num_owned += trained.param.numel()
        numel, dtype = max(1, family.numel), family.param_dtype
        self._flat = comm.empty(numel, dtype=dtype) if self._one_pass else torch.empty(numel, dtype=dtype)
        self._flat.zero_()  # the gaps
        for trained in family.params:
            view = trained.view_in(self._flat, trained.start)
            view.copy_(trained.param.detach())
            trained.param.data = view
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
        result: dict[TrainedParam, dict[str, Tensor]] = {trained: {} for trained in self.family.params}
        for trained, shard in self.shards.items():
            for name, packed in self.tensors.items():
                flat = torch.empty(trained.param.numel())
                for _, elements, values in self._of_all_ranks([trained], shard.of(packed)):
                    flat[elements] = values
                if root in (None, self._comm.rank):
                    result[trained][name] = trained.view_in(flat, 0)
        return result

    def load(self, entries: Mapping[TrainedParam, Mapping[str, Any] | None]) -> None:
        """Take this rank's part of whole states; None: as at the beginning."""
        self._take_values()
        for trained, shard in self.shards.items():
            entry = entries[trained]
            for name, packed in self.tensors.items():
                if entry is not None and name in entry:
                    value = entry[name]
                    if value.shape != trained.param.shape:
                        raise ValueError(
                            f"{name} of {trained.name!r} is {list(value.shape)}, not {list(trained.param.shape)}"
                        )
                    shard.of(packed).copy_(trained.in_memory_order(value)[shard.begin : shard.end])
                elif name != "master":
                    shard.of(packed).zero_()

    def were_read(self) -> None:
        """``tensors`` have other values, which belong to the parameters as they are now."""
        self._versions = self._current_versions()

    def _of_all_ranks(
        self, params: Sequence[TrainedParam], mine: Tensor
    ) -> Iterator[tuple[TrainedParam, slice, Tensor]]:
        """What every rank owns of ``params``, of which ``mine`` is this rank's, in order. Collective where divided."""
        if not self._is_divided:
            return iter([(trained, slice(0, trained.param.numel()), mine) for trained in params])
        owners = [
            [(t, slice(*owned(t.param.numel(), t.turn, rank, self._comm.world_size))) for t in params]
            for rank in range(self._comm.world_size)
        ]
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
        for trained, shard in self.shards.items():
            mine = shard.of(self.tensors["master"])
            values = self._in_buffer(trained, slice(shard.begin, shard.end))
            mine.copy_(torch.where(mine.to(values.dtype) == values, mine, values.float()))

    def _in_buffer(self, trained: TrainedParam, elements: slice) -> Tensor:
        return self._flat[trained.start + elements.start : trained.start + elements.stop]

    def _current_versions(self) -> list[int]:
        return [trained.param._version for trained in self.family.params]

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
                    trained.run(
                        shard, grad=starts.get(trained, 0), param=trained.start, group=self._group_of[id(trained.param)]
                    )
                    for trained, shard in self.shards.items()
                ]
            ),
        )

    def _gather_parameters(self) -> None:
        """Give every rank the parameters that the others have updated. Collective."""
        mine = [self._in_buffer(trained, slice(shard.begin, shard.end)) for trained, shard in self.shards.items()]
        for trained, elements, values in self._of_all_ranks(self.family.params, torch.cat(mine)):
            self._in_buffer(trained, elements).copy_(values)
