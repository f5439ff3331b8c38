"""DataParallel: the wrapper that users see."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pycomm.communicator import Communicator
from pycomm.data_parallel.bucket import build
from pycomm.data_parallel.engine import GradientEngine
from pycomm.data_parallel.replicas import broadcast_state, check_same
from pycomm.errors import PycommError

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MIB = 2**20


class DataParallel(nn.Module):
    """A replica of ``module`` on every rank of ``comm``: each sees its own batches, all get the average gradient.

    Wrapping is collective: parameters and buffers of rank 0 go to all. Then ``.grad`` of every trainable parameter is a
    view of a bucket, and holds the average over ranks when ``backward()`` returns, the same bits on every rank whatever
    ``bucket_mb``, ``overlap`` and ``symmetric`` (host transport: fp32 sums in rank order). Every rank must call
    ``backward()`` on outputs the same number of times. ``torch.autograd.grad`` communicates nothing. Buffers are not
    communicated after wrapping.

    Args:
        module: its parameters on ``comm.device``, those to be trained in float32, float64, float16 or bfloat16. Its
            parameters must not be added, replaced, cast, frozen or unfrozen afterwards.
        comm: used by this wrapper in backward; collectives of others on it must come in the same order on all ranks.
        bucket_mb: most MiB (2**20 bytes) in a bucket, the parameter alignment of 64 bytes included. A larger parameter
            has a bucket of its own; the last bucket also holds one element per rank.
        overlap: reduce full buckets while backward still runs. False: all after it.
        symmetric: buckets in symmetric memory, which peers read directly. False: ordinary memory, staged.
        find_unused: False: a parameter without a gradient is an error that names it. True: it counts as zeros, and its
            ``.grad`` is the average like any other's. At least one parameter must get a gradient on every rank.

    Raises:
        ValueError: nothing to train, a dtype or device that does not fit, ``module`` contains a DataParallel, or
            ``bucket_mb`` is not positive.
        MismatchError: the ranks' models or arguments differ; names the first difference.

    Ref: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2020).
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        *,
        bucket_mb: float = 25.0,
        overlap: bool = True,
        symmetric: bool = True,
        find_unused: bool = False,
    ) -> None:
        super().__init__()
        if not (math.isfinite(bucket_mb) and bucket_mb > 0):
            raise ValueError(f"bucket_mb is {bucket_mb}: it must be a positive number of MiB")
        # The comparison comes first: where the ranks agree, each of them raises the errors that follow.
        check_same(module, comm, f"{bucket_mb=} {overlap=} {symmetric=} {find_unused=}")
        _check_module(module, comm)
        with torch.no_grad():
            broadcast_state(module, comm)
        self.module = module
        self.comm = comm
        trainable = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
        self._buckets, status = build(trainable, comm, cap_bytes=int(bucket_mb * _MIB), symmetric=symmetric)
        self._engine = GradientEngine(self._buckets, status, comm, overlap=overlap, find_unused=find_unused)
        self._wrapped = _signature(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``module(*args, **kwargs)``.

        Raises:
            PycommError: the module's parameters are not those that were wrapped; names the first.
        """
        self._check_unchanged()
        self._engine.recover()
        output = self.module(*args, **kwargs)
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                self._engine.watch(tensor)
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """``backward()`` inside accumulates into this rank's ``.grad`` and communicates nothing.

        The next ``backward()`` outside averages everything accumulated. May be nested.
        """
        with self._engine.no_sync():
            yield

    @property
    def exposed_comm_s(self) -> float:
        """Seconds that the last synchronising backward waited for communication after its own work was done."""
        return self._engine.exposed_comm_s

    @property
    def bucket_bytes(self) -> list[int]:
        """Bytes of each bucket, in launch order. Their sum is the memory of all gradients."""
        return [bucket.flat.numel() * bucket.flat.element_size() for bucket in self._buckets]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the plain module: the same keys, without a prefix."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` gave, on every rank the same. Local.

        Raises:
            ValueError: ``assign`` would replace the parameters whose gradients are in buckets.
        """
        if assign:
            raise ValueError("assign=True replaces the wrapped parameters; load into the plain module before wrapping")
        return self.module.load_state_dict(state_dict, strict=strict)

    def _check_unchanged(self) -> None:
        now = _signature(self.module)
        if len(now) == len(self._wrapped) and all(
            new[0] is old[0] and new[1:] == old[1:] for new, old in zip(now, self._wrapped, strict=True)
        ):
            return
        raise PycommError(f"DataParallel: {_difference(self.module, self._wrapped)}; wrap it after such changes")


# A parameter and what its slot relies on: trainable, dtype, shape, device.
_Signature = tuple[nn.Parameter, bool, torch.dtype, torch.Size, torch.device]


def _signature(module: nn.Module) -> list[_Signature]:
    return [(p, p.requires_grad, p.dtype, p.shape, p.device) for p in module.parameters()]


def _difference(module: nn.Module, wrapped: list[_Signature]) -> str:
    """What has become of the wrapped parameters, the first difference only."""
    known = {id(old[0]): old for old in wrapped}
    names = [name for name, _ in module.named_parameters()]
    for name, new in zip(names, _signature(module), strict=True):
        old = known.get(id(new[0]))
        if old is None:
            return f"{name!r} was added or replaced since wrapping"
        if new[1] != old[1]:
            return f"requires_grad of {name!r} was set to {new[1]} since wrapping"
        if new[2:] != old[2:]:
            return f"{name!r} was {old[2]} {list(old[3])} on {old[4]} and is {new[2]} {list(new[3])} on {new[4]} now"
    return f"{len(wrapped)} parameters were wrapped, {len(names)} of them are left, or their order is another"


def _check_module(module: nn.Module, comm: Communicator) -> None:
    if any(isinstance(part, DataParallel) for part in module.modules()):
        raise ValueError("the module contains a DataParallel: its gradients would be averaged twice; wrap only once")
    named = list(module.named_parameters())
    if not any(param.requires_grad for _, param in named):
        raise ValueError("the module has no trainable parameter, so nothing to average; use it without DataParallel")
    device_type = torch.device(comm.device).type
    for name, param in named:
        if param.device.type != device_type:
            raise ValueError(f"{name!r} is on {param.device}, the communicator on {comm.device}: move the module first")
        if param.requires_grad and param.dtype not in _DTYPES:
            raise ValueError(f"{name!r} is {param.dtype}; trainable can be float32, float64, float16 and bfloat16")
        if getattr(param, "grad_dtype", param.dtype) not in (None, param.dtype):
            raise ValueError(f"{name!r} is {param.dtype} with grad_dtype {param.grad_dtype}: they must be the same")


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, which is where models put their outputs."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
