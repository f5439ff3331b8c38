"""The GPT model: shapes, initialisation, causality, arithmetic count and sampling."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pycomm.models import GPT, GPTConfig, next_token_loss
from pycomm.models.gpt import rotary_table, rotate

SMALL = GPTConfig(vocab_size=97, max_seq=16, num_layers=2, num_heads=2, hidden=32)


def some_tokens(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = GPT(SMALL, seed=5)
    assert torch.equal(before, torch.get_rng_state()), "building a model must not advance torch's generator"
    torch.manual_seed(2)
    again = GPT(SMALL, seed=5).state_dict()
    other = GPT(SMALL, seed=6).state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, again[name]), name
        if value.ndim > 1:
            assert not torch.equal(value, other[name]), name
    # Equal shapes under different names must not get equal numbers.
    assert not torch.equal(first.blocks[0].attention.query.weight, first.blocks[0].attention.key.weight)
    assert not torch.equal(first.blocks[0].mlp.up.weight, first.blocks[1].mlp.up.weight)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_number_of_parameters(positions: str, tied: bool, bias: bool) -> None:
    config = GPTConfig(97, 16, 2, 2, 32, positions=positions, tie_embeddings=tied, bias=bias)  # type: ignore[arg-type]
    model = GPT(config)
    matrices = 2 * 12 * 32 * 32 + 97 * 32 * (1 if tied else 2) + (16 * 32 if positions == "learned" else 0)
    norms = 5 * 32 * (2 if bias else 1)
    biases = 2 * (4 + 4 + 1) * 32 if bias else 0
    assert model.num_parameters() == matrices + norms + biases
    assert model(some_tokens(3, 7)).shape == (3, 7, 97)


def test_a_token_sees_nothing_after_it() -> None:
    model = GPT(SMALL)
    tokens = some_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % SMALL.vocab_size
    before, after = model(tokens)[0], model(changed)[0]
    # fp32 products are summed in an order that may depend on the shape, which is the same here: equal to the bit.
    assert torch.equal(before[:9], after[:9])
    assert not torch.equal(before[9], after[9])


def test_rotation_makes_scores_depend_on_distance_only() -> None:
    # fp64 arithmetic on fp32 angles' sines and cosines: the table's rounding (2**-24 each) is the largest error, and a
    # score is a sum of 8 products of magnitude <= 4 * 4 with two rounded factors each.
    bound = 8 * 16 * 4 * 2**-24
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=generator).clamp(-4, 4)
    table = rotary_table(32, 8)
    turned_q = rotate(query.expand(32, 8), table)
    turned_k = rotate(key.expand(32, 8), table)
    scores = turned_q @ turned_k.T
    for distance in range(-31, 32):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() <= bound
    assert (scores[0] - scores[0, 0]).abs().max() > 0.01, "the rotation does nothing"


def test_flops_per_token_is_what_torch_counts() -> None:
    batch, seq = 3, 16
    model = GPT(SMALL)
    tokens = some_tokens(batch, seq)
    # The plain attention kernel, since it consists of matrix products that the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next_token_loss(model(tokens), tokens).backward()
    assert counter.get_total_flops() == batch * seq * model.flops_per_token(seq)


def test_loss_is_the_mean_negative_log_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (2, 5), generator=generator)
    picked = F.log_softmax(logits, -1).gather(-1, targets[..., None])
    # fp64: ten terms of magnitude below 10, one rounding each in sum and logarithm.
    assert abs(next_token_loss(logits, targets).item() + picked.mean().item()) < 10 * 10 * 2**-52


def test_generate_continues_the_prompt() -> None:
    model = GPT(SMALL)
    prompt = some_tokens(1, 20)[0]  # longer than max_seq: only its end is looked at
    sampled = [model.generate(prompt, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    assert torch.equal(sampled[0][:20], prompt)
    assert sampled[0].shape == (28,)
    greedy = model.generate(prompt, 1, temperature=0)
    assert greedy[-1] == model(prompt[None, -16:])[0, -1].argmax()


def test_wrong_input_is_told() -> None:
    model = GPT(SMALL)
    with pytest.raises(ValueError, match="17 tokens is longer"):
        model(some_tokens(1, 17))
    with pytest.raises(ValueError, match="not empty"):
        model.generate(torch.zeros(0, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="temperature"):
        model.generate(some_tokens(1, 4)[0], 1, temperature=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 30, "num_heads": 4}, "multiple of num_heads"),
        ({"hidden": 12, "num_heads": 4}, "even head width"),
        ({"num_layers": 0}, "num_layers"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_impossible_shapes_are_told(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**settings)  # type: ignore[arg-type]
