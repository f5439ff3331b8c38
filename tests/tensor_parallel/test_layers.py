"""Layers against the unsharded module: outputs, gradients of inputs and parameters; every size is uneven somewhere."""

import pytest
import torch
from torch import nn

from pycomm.tensor_parallel import (
    ColumnParallelLinear,
    ParallelDropout,
    RowParallelLinear,
    VocabParallelEmbedding,
    shard_sizes,
    sum_gradients,
)
from tests.tensor_parallel.helpers import close, part, randn

WORLD_SIZES = [1, 2, 3, 4]
# A sum of k products of fp32 numbers has at most k roundings, each relative to a partial sum; the largest sum below has
# 11 (ffn) + 10 (hidden) + 14 (tokens) terms and the chain of an MLP three of them, and partial sums stay below four
# times the result's largest value for these seeds' normal variables.
ROUNDINGS = 4 * 3 * 14


def mlp(comm, sequence_parallel, overlap):
    """hidden 10 over 3 ranks, ffn 11: every split is uneven."""
    torch.manual_seed(0)
    up, down, norm = nn.Linear(10, 11), nn.Linear(11, 10), nn.LayerNorm(10)
    torch.manual_seed(0)
    settings = {"sequence_parallel": sequence_parallel, "overlap": overlap}
    col, row = ColumnParallelLinear(10, 11, comm, **settings), RowParallelLinear(11, 10, comm, **settings)
    assert torch.equal(col.weight, part(up.weight, comm, 0)), "the same seed, the same full weights"
    assert torch.equal(row.weight, part(down.weight, comm, 1))
    assert torch.equal(row.bias, down.bias)
    my_norm = nn.LayerNorm(10)
    if sequence_parallel:
        sum_gradients(my_norm, comm)
    x, grad = randn(2, 7, 10, seed=1), randn(2, 7, 10, seed=2)
    whole = x.clone().requires_grad_()
    want = norm(down(torch.tanh(up(whole))))
    want.backward(grad)

    def mine(tensor):
        return part(tensor, comm, 1) if sequence_parallel else tensor

    own = mine(x).clone().requires_grad_()
    got = my_norm(row(torch.tanh(col(own))))
    got.backward(mine(grad))
    assert close(got, mine(want), ROUNDINGS)
    assert close(own.grad, mine(whole.grad), ROUNDINGS)
    assert close(col.weight.grad, part(up.weight.grad, comm, 0), ROUNDINGS)
    assert close(col.bias.grad, part(up.bias.grad, comm, 0), ROUNDINGS)
    assert close(row.weight.grad, part(down.weight.grad, comm, 1), ROUNDINGS)
    assert close(row.bias.grad, down.bias.grad, ROUNDINGS)
    assert close(my_norm.weight.grad, norm.weight.grad, ROUNDINGS)
    assert close(my_norm.bias.grad, norm.bias.grad, ROUNDINGS)
    return True


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_an_mlp_is_the_unsharded_one(pool, world_size, sequence_parallel, overlap):
    assert pool.run(world_size, mlp, sequence_parallel, overlap) == [True] * world_size


def whole_inputs_and_outputs(comm):
    torch.manual_seed(0)
    up, down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)
    col = ColumnParallelLinear.from_linear(up, comm, gather_output=True)
    row = RowParallelLinear.from_linear(down, comm, input_is_parallel=False)
    x = randn(6, 5, seed=3)
    wholes = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    want, got = down(up(wholes[0])), row(col(wholes[1]))
    for out in (want, got):
        out.square().sum().backward()
    assert close(got, want, ROUNDINGS)
    assert close(wholes[1].grad, wholes[0].grad, 4 * ROUNDINGS)  # of squares: twice the sums of twice the terms
    assert close(col.weight.grad, part(up.weight.grad, comm, 0), 4 * ROUNDINGS)
    assert close(row.weight.grad, part(down.weight.grad, comm, 1), 4 * ROUNDINGS)
    return True


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gathered_outputs_and_whole_inputs(pool, world_size):
    assert pool.run(world_size, whole_inputs_and_outputs) == [True] * world_size


def embed(comm, num_embeddings, sequence_parallel, padding_idx):
    torch.manual_seed(0)
    full = nn.Embedding(num_embeddings, 6, padding_idx)
    torch.manual_seed(0)
    mine = VocabParallelEmbedding(num_embeddings, 6, comm, padding_idx=padding_idx, sequence_parallel=sequence_parallel)
    assert torch.equal(mine.weight, part(full.weight, comm, 0))
    ids = torch.randint(num_embeddings, (3, 5), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = 0
    grad = randn(3, 5, 6, seed=2)
    want, got = full(ids), mine(ids)
    want.backward(grad)
    got.backward(part(grad, comm, 1) if sequence_parallel else grad)
    assert torch.equal(got, part(want, comm, 1) if sequence_parallel else want)  # one rank has it, the others add zeros
    # A row's gradient adds those of at most 15 tokens.
    assert close(mine.weight.grad, part(full.weight.grad, comm, 0), 15)
    return True


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("num_embeddings", "padding_idx"), [(10, None), (13, 0), (2, 1), (50_257, None)])
def test_an_embedding_is_the_unsharded_one(pool, world_size, num_embeddings, padding_idx):
    for sequence_parallel in (False, True):
        assert pool.run(world_size, embed, num_embeddings, sequence_parallel, padding_idx) == [True] * world_size


def bad_id(comm):
    try:
        VocabParallelEmbedding(10, 4, comm)(torch.tensor([3, 10]))
    except IndexError as error:
        return str(error)
    return None


def test_an_id_outside_the_vocabulary_is_an_error_on_every_rank(pool):
    assert pool.run(2, bad_id) == ["ids from 3 to 10: the vocabulary has 10"] * 2


def drop(comm, dim):
    torch.manual_seed(7)
    x = torch.ones(4, 9, 8)
    dropout = ParallelDropout(0.25, comm, dim)
    mine = x if dim is None else part(x, comm, dim % 3)
    first, second = dropout(mine), dropout(mine)
    assert not mine.numel() or not torch.equal(first, second)
    dropout.eval()
    assert dropout(mine) is mine
    return first.tolist(), torch.randint(1000, ()).item()


@pytest.mark.parametrize("dim", [None, -1, -2])
def test_a_dropout_mask_does_not_depend_on_the_ranks(pool, dim):
    ((alone, state),) = pool.run(1, drop, dim)
    whole = torch.tensor(alone)
    # 288 draws of probability 3/4 with standard deviation 7.3: six of them to either side.
    assert abs(int((whole > 0).sum()) - 216) < 45
    assert whole.unique().tolist() == pytest.approx([0, 4 / 3])
    for world_size in (2, 3, 4):
        parts = pool.run(world_size, drop, dim)
        assert all(after == state for _, after in parts), "one draw a call, whatever the part's size"
        tensors = [torch.tensor(values).view(4, -1, 8) if dim == -2 else torch.tensor(values) for values, _ in parts]
        assert torch.equal(tensors[0] if dim is None else torch.cat(tensors, dim), whole)


def test_counter_bits_are_uniform():
    from pycomm.tensor_parallel.dropout import counter_bits

    bits = counter_bits(torch.tensor(0x1234567890ABCDEF), torch.arange(1 << 16))
    for bit in range(32):
        ones = int((bits >> bit & 1).sum())
        # 65,536 coins: standard deviation 128, six of them to either side.
        assert abs(ones - (1 << 15)) < 6 * 128, bit
    assert len(bits.unique()) > 65_500  # about half a collision is expected among 2**16 of 2**32, times 2**16 / 2
    neighbours = counter_bits(torch.tensor(0x1234567890ABCDEF + 2), torch.arange(1 << 16))
    agreeing = int(((bits ^ neighbours) & 1 == 0).sum())
    assert abs(agreeing - (1 << 15)) < 6 * 128


@pytest.mark.parametrize(
    ("total", "num_ranks", "sizes"),
    [(10, 3, [4, 4, 2]), (10, 4, [3, 3, 3, 1]), (2, 3, [1, 1, 0]), (0, 2, [0, 0]), (5, 4, [2, 2, 1, 0])],
)
def test_shards_follow_torch_chunk(total, num_ranks, sizes):
    assert shard_sizes(total, num_ranks) == sizes
    chunks = [len(chunk) for chunk in torch.arange(total).chunk(num_ranks)]
    assert [size for size in sizes if size] == [size for size in chunks if size]
