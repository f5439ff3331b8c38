"""Backward in two halves gives what backward in one gives, and B leaves to W what it can."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from pycomm.models import GPT, GPTConfig, GPTStage
from pycomm.pipeline.backward import SplitBackward, leaves_of

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NORMS = {
    f"blocks.{n}.{norm}_norm.{part}" for n in (0, 1) for norm in ("attention", "mlp") for part in ("weight", "bias")
}


class Tied(nn.Module):
    """One weight at two places, and a bias at one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) @ self.weight.t() + self.bias


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight, x + weight

    @staticmethod
    def backward(ctx, grad_product, grad_sum):
        x, weight = ctx.saved_tensors
        return grad_product * weight + grad_sum, (grad_product * x + grad_sum).sum((0, 1))


class Odd(nn.Module):
    """A node with two outputs, a parameter that is used as it is, one that is not used, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.shift = nn.Parameter(torch.randn(3, 5, 8))
        self.unused = nn.Parameter(torch.randn(8))
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        product, total = TwoOutputs.apply(self.before(x), self.scale)
        return self.after(F.gelu(product)) @ self.frozen + total + self.shift


class Tables(nn.Module):
    """One table is added to the input, which is a sum; the other is looked up once and used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.kinds = nn.Embedding(7, 8), nn.Embedding(4, 8)
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kinds = self.kinds(torch.arange(15).view(3, 5) % 3)
        return torch.tanh(self.linear(x + self.positions.weight[:5] + kinds)) * kinds.sin()


MODULES = {
    "linear": lambda: nn.Linear(8, 8),
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8, bias=False)),
    "block": lambda: Blocks(),
    "conv": lambda: nn.Sequential(nn.Conv1d(5, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 5, 1)),
    "tied": Tied,
    "odd": Odd,
    "only a parameter": lambda: Returned(),
    "tables": Tables,
    "recurrent": lambda: First(nn.LSTM(8, 8, batch_first=True)),
}
UNSPLIT = {  # vectors, and what cannot be split off
    "mlp": {"2.weight", "2.bias"},
    "block": NORMS,
    "conv": {"1.weight", "1.bias"},
    "tied": {"weight", "bias"},
    "odd": {"scale"},
    "only a parameter": {"weight"},
}


def is_close(got: Tensor, want: Tensor) -> bool:
    """In fp64, within a millionth of a millionth of the largest element: a hundred roundings for each of 45 terms.

    Sums are those of backward in one, but a linear layer adds its product to ``.grad`` with one rounding less.
    """
    return bool((got - want).abs().max() <= 1e-12 * want.abs().max())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = GPT(GPTConfig(hidden=8, num_heads=2, num_layers=2, max_seq=5, bias=True)).blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, None)
        return x


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.view(3, 5, 8)


class First(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.module(x)[0]
        return output


@pytest.mark.parametrize("name", MODULES)
def test_two_halves_give_what_one_gives(name: str) -> None:
    torch.manual_seed(1)
    module = MODULES[name]().double()
    params = dict(module.named_parameters())
    fixed = torch.randn(X.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for turn in range(2):  # the second one adds to what is there
        module.zero_grad()
        want_input = X.clone().requires_grad_()
        for _ in range(turn + 1):
            want_input.grad = None
            module(want_input).backward(fixed.clone())  # .grad may share its memory
        want = {key: param.grad for key, param in params.items()}

        module.zero_grad()
        got_input = X.clone().requires_grad_()
        for again in range(turn + 1):
            before = {key: param.grad.clone() for key, param in params.items() if param.grad is not None}
            split = SplitBackward(module(got_input), leaves_of(module.parameters()))
            input_grad = split.inputs(fixed, got_input)
            touched = {
                key
                for key, param in params.items()
                if param.grad is not None and (key not in before or not torch.equal(param.grad, before[key]))
            }
            if name != "recurrent":  # one node makes all of its gradients at once, and has three outputs
                assert touched == UNSPLIT.get(name, set()), again
            split.weights()
        if want_input.grad is None:
            assert input_grad is None
        else:
            assert torch.equal(input_grad, want_input.grad)
        for key, param in params.items():
            assert (param.grad is None) == (want[key] is None), key
            assert param.grad is None or is_close(param.grad, want[key]), key


def test_a_first_stage_has_no_input_gradient_and_still_splits() -> None:
    model = GPT(GPTConfig(vocab_size=11, hidden=8, num_heads=2, num_layers=2, max_seq=5, positions="learned")).double()
    tokens = torch.arange(10).view(2, 5)
    model(tokens).sum().backward()
    want = {key: param.grad for key, param in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    split = SplitBackward(model(tokens).sum(), leaves_of(model.parameters()))
    assert split.inputs(None, None) is None
    early = {key for key, param in model.named_parameters() if param.grad is not None}
    # The embedding is the output projection, too; norms are vectors.
    assert early == {"token_embedding.weight", "final_norm.weight"} | {n for n in NORMS if n.endswith("weight")}
    split.weights()
    for key, param in model.named_parameters():
        assert is_close(param.grad, want[key]), key


def test_b_of_a_first_stage_keeps_no_graph() -> None:
    """Its first norm leads to nothing but its own scale and the embedding, whose table is left to W at its end."""
    config = GPTConfig(vocab_size=11, hidden=8, num_heads=2, num_layers=2, max_seq=5, tie_embeddings=False)
    stage = GPTStage(GPT(config), range(3))
    output = stage(torch.arange(10).view(2, 5))
    norm = next(node for node in _nodes(output.grad_fn) if "LayerNorm" in node.name())
    split = SplitBackward(output, leaves_of(stage.parameters()))
    split.inputs(torch.ones_like(output), None)
    with pytest.raises(RuntimeError, match="already been freed"):
        _ = norm._saved_input
    assert stage.token_embedding.weight.grad is None
    split.weights()
    assert all(param.grad is not None for param in stage.parameters())


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for following, _ in node.next_functions:
        if following is not None:
            yield from _nodes(following)


@pytest.mark.parametrize("hooked", [False, True])
def test_each_half_visits_a_layer_once(hooked: bool) -> None:
    """And W leaves autograd out where nobody watches it."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    events: list[str] = []
    if hooked:
        module[0].weight.register_hook(lambda grad: events.append("weight"))
    x = X.clone().requires_grad_()
    hidden = module[0](x)
    product = hidden.grad_fn.next_functions[0][0]  # a view of it is what the layer returns
    product.register_hook(lambda *_: events.append("ran"))
    split = SplitBackward(module[2](module[1](hidden)), leaves_of(module.parameters()))
    split.inputs(torch.ones_like(X), x)
    assert events == ["ran"]
    split.weights()
    assert events == (["ran", "ran", "weight"] if hooked else ["ran"])
    grads = [param.grad.clone() for param in module.parameters()]
    split.weights()  # nothing is left to do
    assert all(torch.equal(param.grad, grad) for param, grad in zip(module.parameters(), grads, strict=True))
