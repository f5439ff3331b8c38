"""DataParallel: the wrapper that users see."""

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pycomm.annotations import check_types
from pycomm.checkpoints import Part, num_ranks
from pycomm.communicator import Communicator
from pycomm.data_parallel.engine import GradientEngine, is_averaged
from pycomm.data_parallel.gradients import Options
from pycomm.data_parallel.layout import lay_out
from pycomm.data_parallel.partial import tensors_in
from pycomm.data_parallel.replicas import broadcast_state, check_same, model_entries
from pycomm.errors import PycommError

_log = logging.getLogger("pycomm")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MIB = 2**20


class DataParallel(nn.Module):
    """A replica of ``module`` on every rank of ``comm``: each sees its own batches, all get the average gradient.

    Wrapping is collective: parameters and buffers of rank 0 go to all. Then ``.grad`` of every trainable parameter is a
    view of a bucket, and holds the average over ranks when ``backward()`` returns, the same bits on every rank whatever
    ``bucket_mb``, ``overlap`` and ``symmetric`` (host transport: fp32 sums in rank order). Every rank must call
    ``backward()`` on outputs the same number of times, or use :meth:`join`. ``torch.autograd.grad`` communicates
    nothing.

    Args:
        module: its parameters on ``comm.device``, those to be trained in float32, float64, float16 or bfloat16. Its
            parameters must not be added, replaced, cast, frozen or unfrozen afterwards.
        comm: used by this wrapper in backward; collectives of others on it must come in the same order on all ranks.
        bucket_mb: most MiB (2**20 bytes) in a bucket, the parameter alignment of 64 bytes included. A larger parameter
            has a bucket of its own. After the first backward, buckets are rebuilt in the order in which gradients came.
        grad_dtype: of ``.grad``; None: each parameter's. torch.float32 over 16-bit parameters accumulates micro-batches
            without rounding; torch's own optimizers refuse such gradients, :class:`pycomm.ShardedAdamW` takes them.
        wire_dtype: torch.bfloat16 or torch.float16 sends float32 gradients in 16 bits: half the bytes, and half as much
            memory again. Each is rounded before it is sent, the sum over ranks is fp32, the average is rounded once.
        overlap: reduce full buckets while backward still runs. False: all after it.
        symmetric: buckets in symmetric memory, which peers read directly. False: ordinary memory, staged.
        find_unused: False: a parameter without a gradient is an error that names it. True: it counts as zeros, and its
            ``.grad`` is the average like any other's. At least one parameter must get a gradient on every rank.
        broadcast_buffers: every forward in training mode, outside :meth:`no_sync`, starts with rank 0's buffers
            (batch norm's statistics) on every rank. False: they are made equal when wrapping only.

    Raises:
        ValueError: nothing to train, dtypes or a device that do not fit, a part of ``module`` is wrapped already, or
            ``bucket_mb`` is not positive.
        MismatchError: the ranks' models or arguments differ; names the first difference.

    Ref: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2020).
    """

    @check_types()
    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        *,
        bucket_mb: float = 25.0,
        grad_dtype: torch.dtype | None = None,
        wire_dtype: torch.dtype | None = None,
        overlap: bool = True,
        symmetric: bool = True,
        find_unused: bool = False,
        broadcast_buffers: bool = False,
    ) -> None:
        super().__init__()
        if not (math.isfinite(bucket_mb) and bucket_mb > 0):
            raise ValueError(f"bucket_mb is {bucket_mb}: it must be a positive number of MiB")
        # The comparison comes first: where the ranks agree, each of them raises the errors that follow.
        options = (
            f"{bucket_mb=} {grad_dtype=} {wire_dtype=} {overlap=} {symmetric=} {find_unused=} {broadcast_buffers=}"
        )
        check_same("wrap different models", [options, *model_entries(module)], comm)
        _check_module(module, comm)
        named = [
            (name, param, _grad_dtype(name, param, grad_dtype, wire_dtype))
            for name, param in module.named_parameters()
            if param.requires_grad
        ]
        with torch.no_grad():
            broadcast_state(module, comm)
        for _, param, dtype in named:
            if dtype != param.dtype:
                param.grad_dtype = dtype
        self.module = module
        self.comm = comm
        self._broadcast_buffers = broadcast_buffers
        self._has_warned = False
        how = Options(int(bucket_mb * _MIB), overlap, symmetric, wire_dtype, find_unused)
        self._engine = GradientEngine(lay_out(named, comm.rank, comm.world_size), comm, how)
        self._wrapped = _signature(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``module(*args, **kwargs)``.

        Raises:
            PycommError: the module's parameters are not those that were wrapped; names the first.
        """
        self._check_unchanged()
        self._engine.recover()
        if self._broadcast_buffers and self.training and torch.is_grad_enabled() and not self._engine.in_no_sync:
            broadcast_state(self.module, self.comm, only_buffers=True)
        output = self.module(*args, **kwargs)
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                self._engine.watch(tensor)
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """``backward()`` inside accumulates into this rank's ``.grad`` and communicates nothing.

        The next ``backward()`` outside averages everything accumulated. May be nested. Under stage 2 of
        :class:`pycomm.ShardedAdamW` gradients are whole from here to that backward, which a warning says once.
        """
        if self.averages_every_backward and not self._has_warned:
            self._has_warned = True
            if self.comm.rank == 0:
                _log.warning(
                    "no_sync() under ShardedAdamW(stage=2): gradients accumulate whole on every rank, and their memory "
                    "is not divided; let every micro-batch's backward run outside of it, and each is averaged"
                )
        with self._engine.no_sync():
            yield

    @contextmanager
    def join(self, after_backward: Callable[[], object] | None = None) -> Iterator[None]:
        """Ranks inside may run out of batches at different times. Collective: every rank leaves when the last one does.

        A rank that reaches the end of the block takes part in the backwards of the others with gradients of zeros (the
        average still divides by the number of ranks). Inside, buckets are reduced after backward, without overlap.

        Args:
            after_backward: what the loop does after each synchronising backward, such as clipping, the optimizer's and
                the scheduler's step; a rank that has run out calls it after each backward of the others, so that its
                weights and optimizer go on with theirs. None: at the end everyone gets parameters and buffers from a
                rank that went on to the last; the optimizers' states differ then.

        Raises:
            ValueError: sharded optimizer states without ``after_backward``, or ``broadcast_buffers``.
        """
        if self._broadcast_buffers:
            raise ValueError(
                "join: broadcast_buffers communicates in every forward, which a rank without batches lacks"
            )
        if after_backward is None and self._engine.stage:
            raise ValueError("join: a rank that has run out still owns a shard; pass after_backward, which steps there")
        with self._engine.join(after_backward or (lambda: None)):
            yield
        if after_backward is None and self._engine.last_active:
            broadcast_state(self.module, self.comm, root=self._engine.last_active[0])

    @property
    def averages_every_backward(self) -> bool:
        """Whether gradients shall not pile up under :meth:`no_sync`: in stage 2 of :class:`pycomm.ShardedAdamW`."""
        return self._engine.gradients.packed

    def gradient_parts(self, param: nn.Parameter) -> list[tuple[int, Tensor]]:
        """All that counts of the gradient of ``param`` on this rank, to be changed in place before the step.

        Collective. Without averages of earlier backwards it is one tensor, from element 0 on: the whole ``.grad``.
        Under stages 1 and 2 of :class:`pycomm.ShardedAdamW`, averages count on this rank's shard alone: [numel], with
        the element of the parameter where it starts. A parameter that is a copy of one in another DataParallel gets
        equal shards there if both have one number as their attribute ``shard_turn`` when they are wrapped.
        """
        gradients = self._engine.gradients
        return gradients.parts(next(trained for trained in gradients.params if trained.param is param))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the plain module's; under stage 2 of :class:`pycomm.ShardedAdamW`, what was averaged so far, too."""
        self.module.zero_grad(set_to_none)
        self._engine.clear()

    @property
    def exposed_comm_s(self) -> float:
        """Seconds that the last synchronising backward waited for communication after its own work was done."""
        return self._engine.exposed_comm_s

    @property
    def bucket_bytes(self) -> list[int]:
        """Bytes of each bucket's gradients, in launch order."""
        return [bucket.num_bytes for bucket in self._engine.gradients.buckets]

    @property
    def gradient_bytes(self) -> int:
        """Memory of gradients on this rank: buckets, copies for the wire, shards; not what autograd has for now."""
        return self._engine.gradients.num_bytes

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the plain module: the same keys, without a prefix.

        Over a mesh with other axes, ranks have other values under these names; torch.distributed.checkpoint, which
        would lose them, raises.
        """
        state = self.module.state_dict(*args, **kwargs)
        if num_ranks() > self.comm.world_size:
            of = f"that of {self.comm}, one place of a mesh of {num_ranks()} ranks"
            for name, value in state.items():
                if type(value) is Tensor:  # not with keep_vars=True
                    state[name] = Part.made_of(value, of)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` gave, on every rank the same. Local.

        Raises:
            ValueError: ``assign`` would replace the parameters whose gradients are in buckets.
        """
        if assign:
            raise ValueError("assign=True replaces the wrapped parameters; load into the plain module before wrapping")
        return self.module.load_state_dict(state_dict, strict=strict)

    def _check_unchanged(self) -> None:
        if _signature(self.module) != self._wrapped:
            raise PycommError(f"DataParallel: {_difference(self.module, self._wrapped)}; wrap it after such changes")


# id() of a parameter, and what its buffers rely on: trainable, dtype, shape, device.
_Signature = tuple[int, bool, torch.dtype, torch.Size, torch.device]


def _signature(module: nn.Module) -> list[_Signature]:
    return [(id(p), p.requires_grad, p.dtype, p.shape, p.device) for p in module.parameters()]


def _difference(module: nn.Module, wrapped: list[_Signature]) -> str:
    """What has become of the wrapped parameters, the first difference only."""
    known = {old[0]: old for old in wrapped}
    names = [name for name, _ in module.named_parameters()]
    for name, new in zip(names, _signature(module), strict=True):
        old = known.get(new[0])
        if old is None:
            return f"{name!r} was added or replaced since wrapping"
        if new[1] != old[1]:
            return f"requires_grad of {name!r} was set to {new[1]} since wrapping"
        if new[2:] != old[2:]:
            return f"{name!r} was {old[2]} {list(old[3])} on {old[4]} and is {new[2]} {list(new[3])} on {new[4]} now"
    return f"{len(wrapped)} parameters were wrapped, {len(names)} of them are left, or their order is another"


def _check_module(module: nn.Module, comm: Communicator) -> None:
    _check_wrapped_once(module)
    named = list(module.named_parameters())
    if not any(param.requires_grad for _, param in named):
        raise ValueError("the module has no trainable parameter, so nothing to average; use it without DataParallel")
    device_type = torch.device(comm.device).type
    for name, param in named:
        if param.device.type != device_type:
            raise ValueError(f"{name!r} is on {param.device}, the communicator on {comm.device}: move the module first")
        if param.requires_grad and param.dtype not in _DTYPES:
            raise ValueError(f"{name!r} is {param.dtype}; trainable can be float32, float64, float16 and bfloat16")


def _check_wrapped_once(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, (DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(
                f"the module contains a {type(part).__name__}: its gradients would be averaged twice; wrap only once, "
                "the module that has all parameters"
            )
    if any(is_averaged(param) for param in module.parameters()):
        gc.collect()  # a wrapper that was dropped may be in a cycle
    for name, param in module.named_parameters():
        if is_averaged(param):
            raise ValueError(
                f"{name!r} is in another DataParallel already: its gradient would be averaged twice; wrap only once, "
                "the module that has all parameters, or drop the other wrapper and its optimizer before"
            )


def _grad_dtype(name: str, param: nn.Parameter, asked: torch.dtype | None, wire: torch.dtype | None) -> torch.dtype:
    """The dtype of the parameter's gradient."""
    own = param.grad_dtype if param.grad_dtype is not None else param.dtype
    dtype = own if asked is None else asked
    if dtype != param.dtype and not (dtype == torch.float32 and param.dtype.itemsize == 2):
        raise ValueError(
            f"{name!r} is {param.dtype}: its gradient can have that dtype, or torch.float32 over 16-bit parameters, "
            f"not {dtype}"
        )
    if param.grad is not None and param.grad.dtype != dtype:
        raise ValueError(f"{name!r} has a {param.grad.dtype} gradient already; zero_grad() before wrapping")
    if wire not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"wire_dtype={wire}: it is torch.bfloat16, torch.float16 or None")
    if wire is not None and dtype != torch.float32:
        raise ValueError(f"wire_dtype={wire} is for float32 gradients; that of {name!r} is {dtype}")
    return dtype
