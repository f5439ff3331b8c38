"""The blocks of benchmarks/tensor_parallel.py and the ways in which they are cut over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pycomm
from pycomm.tensor_parallel import ColumnParallelLinear, RowParallelLinear

HEAD_WIDTH = 64
COLUMN = ("up", "query", "key", "value")  # the others are cut by rows


class MLP(nn.Module):
    """Two products with a GELU between them."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Attention(nn.Module):
    """Causal self-attention over heads of 64; whoever cuts the linear layers decides how many are here."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            layer(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(0, 1) for layer in (self.query, self.key, self.value)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.output(mixed.transpose(0, 1).flatten(1))


def block_of(name: str, hidden: int, ffn: int) -> nn.Module:
    """The whole block, with the same weights on every call."""
    torch.manual_seed(0)
    return MLP(hidden, ffn) if name == "mlp" else Attention(hidden)


def pycomm_block(block: nn.Module, comm: pycomm.Communicator) -> nn.Module:
    """Cut by pycomm's layers."""
    for name, layer in list(block.named_children()):
        cut = ColumnParallelLinear if name in COLUMN else RowParallelLinear
        setattr(block, name, cut.from_linear(layer, comm))
    return block


def local_block(block: nn.Module, comm: pycomm.Communicator) -> nn.Module:
    """This rank's products and nothing else: its result is a partial sum."""
    for name, layer in list(block.named_children()):
        cut = ColumnParallelLinear if name in COLUMN else RowParallelLinear
        part = cut.from_linear(layer, comm)
        local = nn.Linear(part.weight.shape[1], part.weight.shape[0])
        local.weight, local.bias = part.weight, part.bias
        setattr(block, name, local)
    return block


def dtensor_block(block: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Cut by torch's own tensor parallelism, which communicates over ``group``."""
    plan = {name: ColwiseParallel() if name in COLUMN else RowwiseParallel() for name, _ in block.named_children()}
    return parallelize_module(block, DeviceMesh.from_group(group, "cpu"), plan)


def step(block: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward; whoever is next finds the output before backward, and x's gradient after it."""
    block.zero_grad(set_to_none=True)
    x.grad = None
    out = arrived(block(x))
    out.backward(grad)
    x.grad = arrived(x.grad)
    return out


def arrived(tensor: Tensor) -> Tensor:
    """DTensor's results may still be under way, until something reads them."""
    return dist._functional_collectives.wait_tensor(tensor) if hasattr(tensor, "trigger_wait") else tensor


def results(block: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    own = x.detach().clone().requires_grad_()
    out = step(block, own, grad)
    return [out.detach(), own.grad, *(param.grad for param in block.parameters())]


def count_wrong(block: nn.Module, reference: nn.Module, x: Tensor, grad: Tensor) -> int:
    """Differences in the output and in the input's gradient beyond what sums of that many terms may lose."""
    terms = max(p.numel() // p.shape[0] for p in reference.parameters() if p.dim() == 2) * 4
    pairs = list(zip(results(block, x, grad), results(reference, x, grad), strict=True))[:2]
    return sum(int(((a - b).abs() > terms * 2**-24 * b.abs().max()).sum()) for a, b in pairs)
