"""Cross-entropy over a vocabulary that is cut over ranks, against torch's over the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.profiler import profile

from pycomm.errors import MismatchError
from pycomm.tensor_parallel import vocab_parallel_cross_entropy
from tests.tensor_parallel.helpers import part, randn

WORLD_SIZES = [1, 2, 3, 4]
TOKENS = 12


def reference(logits, target, label_smoothing, z_loss):
    """In fp64, so that its own error does not count."""
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), label_smoothing=label_smoothing)
    counted = logits.logsumexp(-1)[target != -100]
    return loss + z_loss * counted.square().mean()


def compare(comm, vocab, label_smoothing, z_loss, dtype):
    logits = (4 * randn(3, 4, vocab, seed=1)).to(dtype)
    target = torch.randint(vocab, (3, 4), generator=torch.Generator().manual_seed(2))
    target[0, 0] = target[2, 3] = -100
    whole = logits.double().requires_grad_()
    want = reference(whole, target, label_smoothing, z_loss)
    want.backward()
    mine = part(logits, comm, -1).clone().requires_grad_()
    got = vocab_parallel_cross_entropy(mine, target, comm, label_smoothing=label_smoothing, z_loss=z_loss)
    got.backward()
    # fp32: exponentials have a relative error of a few roundings times the exponent (below 64), and a sum of V of them,
    # added by torch in blocks, fewer than sqrt(V) more; logarithms turn relative errors into absolute ones.
    roundings = 4 * 64 + math.sqrt(vocab)
    bound = roundings * 2**-24 * (1 + 2 * z_loss * 32)
    assert got.dtype == torch.float32
    assert abs(got.item() - want.item()) <= bound * max(1.0, want.item())
    rounded = 2**-8 if dtype == torch.bfloat16 else 0  # 8 significant bits: half of 2 ** -7
    error = (mine.grad.double() - part(whole.grad, comm, -1)).abs()
    assert error.numel() == 0 or error.max() <= bound + rounded * float(whole.grad.abs().max())
    return got.item()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("vocab", [3, 10, 50_257])
def test_loss_and_gradient_are_those_of_the_whole(pool, world_size, vocab):
    for label_smoothing, z_loss in ((0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.3, 1e-2)):
        losses = pool.run(world_size, compare, vocab, label_smoothing, z_loss, torch.float32)
        assert len(set(losses)) == 1, "the same bits on every rank"
    pool.run(world_size, compare, vocab, 0.1, 1e-3, torch.bfloat16)


def nothing_counts(comm):
    logits = part(randn(2, 10, seed=1), comm, -1).clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([7, 7]), comm, ignore_index=7)
    return math.isnan(loss.item())


def test_no_counted_token_gives_nan_as_in_torch(pool):
    assert pool.run(3, nothing_counts) == [True] * 3


def largest_allocations(comm, vocab):
    logits = part(torch.zeros(64, vocab), comm, -1).clone().requires_grad_()
    target = torch.arange(64) * 3000

    def measure(call):
        with profile(profile_memory=True) as profiled:
            result = call()
        sizes = [event.nbytes() for event in profiled.kineto_results.events() if event.name() == "[memory]"]
        peak = held = 0
        for size in sizes:
            held += size
            peak = max(peak, held)
        return result, max(sizes), peak

    loss, *forward = measure(lambda: vocab_parallel_cross_entropy(logits, target, comm))
    _, *backward = measure(loss.backward)
    return forward, backward


def test_nobody_allocates_the_full_logits(pool):
    vocab, num_ranks = 250_880, 4
    mine = 64 * vocab // num_ranks * 4
    for forward, backward in pool.run(num_ranks, largest_allocations, vocab):
        assert forward[1] <= 4 << 20, "a block of exponentials and what has one number a token"
        assert backward[0] <= mine, "the gradient"
        assert backward[1] <= mine + (8 << 20)
        assert backward[1] >= mine, "else nothing was measured"


def wrong_calls(comm):
    messages = []
    logits = torch.zeros(4, 5)
    for target, settings in ((torch.zeros(3, dtype=torch.int64), {}), (torch.full((4,), 10), {})):
        try:
            vocab_parallel_cross_entropy(logits, target, comm, **settings)
        except ValueError as error:
            messages.append(str(error))
    try:
        rows = 4 if comm.rank == 0 else 3
        vocab_parallel_cross_entropy(logits[:rows], torch.zeros(rows, dtype=torch.int64), comm)
    except MismatchError as error:
        messages.append(error.calls[1])
    return messages


def test_wrong_calls_are_told(pool):
    want = [
        "target (3,) does not fit logits (4, 5)",
        "a target is outside the vocabulary of 10",
        "vocab_parallel_cross_entropy of 3 tokens",
    ]
    assert pool.run(2, wrong_calls) == [want] * 2
