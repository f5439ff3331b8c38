"""torch.compile(fullgraph=True): no graph break in tensor-parallel blocks, and the results of the eager ones."""

import pytest
import torch
from torch import nn

from pycomm.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from tests.tensor_parallel.helpers import close, gradients, randn


def mlp(comm, sequence_parallel):
    torch.manual_seed(0)
    settings = {"sequence_parallel": sequence_parallel}
    return nn.Sequential(
        ColumnParallelLinear(8, 12, comm, **settings), nn.GELU(), RowParallelLinear(12, 8, comm, **settings)
    )


class LanguageModel(nn.Module):
    """Embedding, MLP and loss: every operator of the layers."""

    def __init__(self, comm):
        super().__init__()
        torch.manual_seed(0)
        self.comm = comm
        self.embedding = VocabParallelEmbedding(10, 8, comm)
        self.mlp = mlp(comm, False)
        self.head = ColumnParallelLinear(8, 10, comm)

    def forward(self, ids, targets):
        return vocab_parallel_cross_entropy(self.head(self.mlp(self.embedding(ids))), targets, self.comm)


def run(module, *inputs):
    module.zero_grad()
    out = module(*inputs)
    out.square().sum().backward()
    return out.detach(), gradients(module)


def compiled_is_eager(comm, kind):
    if kind == "language model":
        module, inputs = LanguageModel(comm), (torch.arange(6).view(2, 3), torch.arange(6).view(2, 3) + 3)
    else:
        module, inputs = mlp(comm, kind == "sequence parallel"), (randn(2, 6, 8, seed=1),)
    torch._dynamo.reset()
    want, want_grads = run(module, *inputs)
    # aot_eager traces forward and backward, functionalises them and runs the graphs; it needs no C++ compiler.
    got, got_grads = run(torch.compile(module, fullgraph=True, backend="aot_eager"), *inputs)
    # The same kernels in another order at most: sums of 12 terms of a chain of three products, twice (squares).
    assert close(got, want, 2 * 3 * 12)
    for name, grad in want_grads.items():
        assert close(got_grads.get(name, got_grads.get(f"_orig_mod.{name}")), grad, 2 * 3 * 12 * 12), name
    return len(want_grads)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("kind", "num_grads"), [("mlp", 4), ("sequence parallel", 4), ("language model", 7)])
def test_a_compiled_block_is_the_eager_one(pool, world_size, kind, num_grads):
    assert pool.run(world_size, compiled_is_eager, kind) == [num_grads] * world_size
