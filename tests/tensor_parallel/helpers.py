"""What the tensor-parallel tests share."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pycomm.tensor_parallel import shard_sizes

EPS = 2.0**-24  # half a unit in the last place of fp32: the error of one rounding, relative


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def part(whole: Tensor, comm, dim: int, unit: int = 1) -> Tensor:
    """This rank's part by the rule of torch.chunk, in whole units."""
    sizes = [unit * size for size in shard_sizes(whole.shape[dim] // unit, comm.world_size)]
    return whole.split(sizes, dim)[comm.rank]


def close(got: Tensor, want: Tensor, num_roundings: int) -> bool:
    """Equal but for that many roundings, each relative to the largest value: see the callers for their counts."""
    assert got.shape == want.shape, (got.shape, want.shape)
    if not want.numel():
        return True
    return bool((got - want).abs().max() <= num_roundings * EPS * max(1.0, float(want.abs().max())))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in module.named_parameters() if param.grad is not None}


class Seen(TorchDispatchMode):
    """Names of the operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
