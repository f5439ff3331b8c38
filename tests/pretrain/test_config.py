"""Settings that do not fit are told before anything starts."""

import itertools
import json

import pytest

from pycomm.pretrain import PRESETS, ConfigError, DataConfig, OptimConfig, RunConfig
from pycomm.pretrain.loop import learning_rate
from tests.pretrain.helpers import small_config


def test_presets_are_valid_for_one_and_two_workers() -> None:
    for preset in PRESETS.values():
        for world_size in (1, 2):
            preset.validate(world_size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pp": 2}, "data parallel only"),
        ({"tp": 2}, "data parallel only"),
        ({"dp": 4}, "--dp must equal"),
        ({"steps": 0}, "--steps must be from 1"),
        ({"seed": -1}, "seed"),
        ({"micro_batch": 3}, "not a multiple of 2 workers"),
        ({"data": DataConfig(held_out=1.0)}, "--data.held-out must be from just above 0 to just below 1"),
        ({"optim": OptimConfig(lr=-1.0)}, "--optim.lr"),
        ({"run": RunConfig(save_every=0)}, "--run.save-every must be from 1"),
        ({"run": RunConfig(timeout_s=0.0)}, "timeout-s"),
    ],
)
def test_what_does_not_fit_is_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**settings).validate(2)


def test_settings_survive_json() -> None:
    written = json.loads(json.dumps(small_config().to_json()))
    assert written["model"]["hidden"] == 32
    assert written["text"][0].endswith("argparse.py")


def test_learning_rate_rises_then_falls() -> None:
    config = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=4)
    rates = [learning_rate(step, 20, config) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    # cos(pi) is -1 exactly; 0.1 + 0.9 * 0 differs from 0.1 by no rounding.
    assert rates[-1] == 0.1
    assert learning_rate(1, 1, OptimConfig(lr=1.0, warmup_steps=0)) == pytest.approx(0.1)
