"""AdamW whose states, and gradients, are divided over the ranks (ZeRO), in one pass over shared memory.

Every rank owns whole blocks of every parameter (``shards.py``). It updates those in fp32 and writes the new values into
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

from pycomm.annotations import check_type, check_types
from pycomm.checkpoints import PER_PLACE, are_connected, num_ranks
from pycomm.data_parallel.gradients import check_on_host
from pycomm.data_parallel.layout import Shard, TrainedParam
from pycomm.data_parallel.module import DataParallel
from pycomm.data_parallel.replicas import check_same
from pycomm.data_parallel.states import FamilyState
from pycomm.errors import PycommError
from pycomm.fused import AdamWScalars

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
        params = self._engine.gradients.params
        check_on_host(
            "ShardedAdamW",
            ((repr(param.name), param.param) for param in params),
            "torch.optim.AdamW(ddp.parameters()) takes what DataParallel averages there",
        )
        options = f"{stage=} " + " ".join(f"{k}={v}" for g in self.param_groups for k, v in g.items() if k != "params")
        numbers_of_groups = [f"{param.name!r} in group {group_of.get(id(param.param))}" for param in params]
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
        numbers = self._numbers()
        has_states = root in (None, self._ddp.comm.rank)
        result["state"] = {
            numbers[id(param.param)]: {"step": torch.tensor(float(self._num_steps)), **tensors}
            for state in self._states
            for param, tensors in state.whole(root).items()
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
        numbers = self._numbers()
        keys = dict(zip(range(sum(sizes)), (key for group in saved for key in group["params"]), strict=True))
        steps = {float(entry["step"]) for entry in state_dict["state"].values()}
        if len(steps) > 1:
            raise ValueError(f"parameters made different numbers of steps, {sorted(steps)}; here they go together")
        for state in self._states:
            state.load(
                {param: state_dict["state"].get(keys[numbers[id(param.param)]]) for param in state.family.params}
            )
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
            for param, shard in state.shards():
                yield param, shard, state.tensors

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
        names = ", ".join(repr(param.name) for param in params[:_NUM_NAMED]) + (
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

    def _numbers(self) -> dict[int, int]:
        """id of each parameter -> its number in state dicts: in the order of the groups."""
        params = [param for group in self.param_groups for param in group["params"]]
        return {id(param): number for number, param in enumerate(params)}

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
        missing = [param.name for param in params if id(param.param) not in group_of]
        if missing:
            raise ValueError(f"{len(missing)} trainable parameter(s) are in no group, the first is {missing[0]!r}")
        if len(group_of) != len(params):
            raise ValueError("param_groups have parameters that the DataParallel does not train")
        for param in params:
            if param.param.dtype not in _DTYPES:
                raise ValueError(
                    f"{param.name!r} is {param.param.dtype}; ShardedAdamW takes float32, bfloat16, float16"
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
