"""Models, batches and references that the data-parallel tests share. Every worker builds them from seeds alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pycomm import Communicator

IN, HIDDEN, OUT, ROWS = 12, 24, 5, 4  # ROWS: of one rank's batch
CONFIGS = [
    {"bucket_mb": bucket_mb, "overlap": overlap, "symmetric": symmetric}
    for bucket_mb in (0.001, 0.05, 25.0)
    for overlap in (True, False)
    for symmetric in (True, False)
]


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters uniform in +-1/4 from a generator of their own: the global one belongs to the whole process."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.rand(param.shape, generator=generator) / 2 - 0.25)
    return model


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)
    return seeded(nn.Sequential(*layers), seed).to(dtype)


def batch(rank: int, step: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x [ROWS, IN] and target [ROWS, OUT] of one rank's step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(ROWS, IN, generator=generator)
    return x.to(dtype), torch.randn(ROWS, OUT, generator=generator).to(dtype)


def loss_of(model: nn.Module, rank: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean over the rows, so that the average over ranks is the mean over the concatenated batch."""
    x, target = batch(rank, step, dtype)
    return ((model(x) - target) ** 2).sum() / (2 * ROWS)


def local_gradients(model: nn.Module, rank: int, steps: Sequence[int] = (0,)) -> dict[str, Tensor]:
    """What plain torch accumulates on ``rank`` over the steps."""
    model.zero_grad()
    for step in steps:
        loss_of(model, rank, step, next(model.parameters()).dtype).backward()
    return gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def rank_order_average(parts: Sequence[Tensor]) -> Tensor:
    """The sum that pycomm promises: in rank order, 16-bit floats in fp32, divided once, rounded once."""
    dtype = parts[0].dtype
    total = parts[0].to(torch.promote_types(dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return (total / len(parts)).to(dtype)


def expected(world_size: int, steps: Sequence[int] = (0,), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Averages of all ranks' local gradients, which this process computes one after the other."""
    parts = [local_gradients(mlp(dtype=dtype), rank, steps) for rank in range(world_size)]
    return {name: rank_order_average([part[name] for part in parts]) for name in parts[0]}


def differing(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """Names whose bits differ (0.0 and -0.0 do), or that only one side has."""
    both = got.keys() & want.keys()
    return sorted((got.keys() ^ want.keys()) | {name for name in both if bits(got[name]) != bits(want[name])})


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


@contextmanager
def own_communicator(comm) -> Iterator[object]:
    """A communicator that a test may break, since the pool's is used by later tests."""
    own = comm.split(0)
    try:
        yield own
    finally:
        own.close()


def message_of(error_type: type[BaseException], function, *args) -> str:
    """The message of the error that the call must raise; pytest.raises is not at hand in a worker."""
    try:
        function(*args)
    except error_type as error:
        return str(error)
    return f"no {error_type.__name__} was raised"


class Recorder:
    """A communicator that notes the averages it passes on: bytes, and whether asynchronous."""

    def __init__(self, comm, events: list):
        self.comm, self.events = comm, events

    __class__ = Communicator  # to isinstance

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def all_reduce(self, tensor, op="sum", async_op=False):
        if op == "avg":
            self.events.append((tensor.numel() * tensor.element_size(), async_op))
        return self.comm.all_reduce(tensor, op=op, async_op=async_op)

    def reduce_gradients(self, reduction, memory, *, accumulate, async_op):
        self.events.append((memory.numel() * memory.element_size(), async_op))
        return self.comm.reduce_gradients(reduction, memory, accumulate=accumulate, async_op=async_op)


class FailInBackward(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("planted")
