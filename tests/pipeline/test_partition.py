"""Cutting layers into stages by cost, and a GPT into stages."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pycomm
from pycomm.models import GPT, GPTConfig, GPTStage, gpt_layers, gpt_stages, next_token_loss, split_gpt
from pycomm.pipeline import measure_layers, measure_memory, parameter_costs, partition


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.integers(0, 20), min_size=1, max_size=8), num_stages=st.integers(1, 8))
def test_no_other_cut_has_a_cheaper_dearest_stage(costs: list[int], num_stages: int) -> None:
    if num_stages > len(costs):
        with pytest.raises(ValueError, match=f"{len(costs)} layer.*{num_stages} stage"):
            partition(costs, num_stages)
        return
    stages = partition(costs, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(len(costs)))
    assert all(len(stage) for stage in stages)
    assert len(stages) == num_stages
    best = min(
        max(sum(costs[start:end]) for start, end in zip((0, *cuts), (*cuts, len(costs)), strict=True))
        for cuts in combinations(range(1, len(costs)), num_stages - 1)
    )
    assert max(sum(costs[layer] for layer in stage) for stage in stages) == best


def test_wrong_costs() -> None:
    with pytest.raises(ValueError, match="not negative"):
        partition([1.0, -1.0], 2)
    with pytest.raises(ValueError, match="0 stage"):
        partition([1.0], 0)


MODEL = GPT(GPTConfig(vocab_size=400, max_seq=8, num_layers=4, num_heads=2, hidden=16))


def test_a_gpt_is_cut_by_estimated_measured_or_given_costs() -> None:
    # A block has 12 x 16 x 16 weights in products, the output projection 400 x 16: as much as two blocks.
    assert split_gpt(MODEL, 2) == [range(4), range(4, 6)]
    assert split_gpt(MODEL, 2, [9, 1, 1, 1, 1, 1]) == [range(1), range(1, 6)]
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    costs = measure_layers(gpt_layers(MODEL), tokens, loss_of=lambda x: next_token_loss(x, tokens), repeats=2)
    assert len(costs) == 6
    assert all(cost > 0 for cost in costs)
    assert all(param.grad is None for param in MODEL.parameters())
    assert parameter_costs(gpt_layers(MODEL))[1] == 12 * 16 * 16 + 2 * 16
    with pytest.raises(ValueError, match="6 layer.*7 stage"):
        split_gpt(MODEL, 7)
    with pytest.raises(ValueError, match="6 costs are needed"):
        split_gpt(MODEL, 2, [1.0])


def test_memory_counts_every_storage_once_and_no_parameter() -> None:
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Identity()]
    # The sample for the first product, ReLU's output for itself and for the second product; in float32.
    assert measure_memory(layers, torch.ones(3, 4)) == [3 * 4 * 4, 3 * 8 * 4, 0, 0]
    assert measure_memory(layers, torch.ones(3, 4), loss_of=lambda x: x.square().sum()) == [48, 96, 0, 3 * 2 * 4]
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    kept = measure_memory(gpt_layers(MODEL), tokens, loss_of=lambda x: next_token_loss(x, tokens))
    assert kept[-1] >= 2 * 8 * 400 * 4  # log-probabilities
    assert len(set(kept[1:5])) == 1


def test_stages_have_the_names_and_the_outputs_of_the_whole() -> None:
    cuts = [range(2), range(2, 3), range(3, 6)]
    stages = [GPTStage(MODEL, cut) for cut in cuts]
    names = [name for stage in stages for name in stage.state_dict()]
    assert sorted(names) == sorted(MODEL.state_dict())
    tokens = torch.arange(16).view(2, 8)
    assert torch.equal(nn.Sequential(*stages)(tokens), MODEL(tokens))
    assert torch.equal(nn.Sequential(*gpt_layers(MODEL))(tokens), MODEL(tokens))
    with pytest.raises(ValueError, match="9 tokens"):
        stages[1](torch.zeros(1, 9, 16))


def test_cuts_by_hand_must_divide_the_layers() -> None:
    with pycomm.init() as comm:
        (first, second) = gpt_stages(MODEL, comm, [0, 0], [range(1), range(1, 6)])
        assert (first.stage_index, second.stage_index) == (0, 1)
        assert first.shared.keys() == second.shared.keys()
        for cuts in ([range(6)], [range(1), range(2, 6)], [range(1), range(1, 5)]):
            with pytest.raises(ValueError, match="divide 6 layers among 2 stages"):
                gpt_stages(MODEL, comm, [0, 0], cuts)
