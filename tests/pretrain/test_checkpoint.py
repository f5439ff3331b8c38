"""Checkpoints: complete or absent, exact, and refused where they do not fit."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import pycomm
from pycomm.pretrain import ConfigError, PretrainConfig, RunConfig, TrainState, build_state, checkpoint, train
from pycomm.pretrain.data import Corpus, prepare
from tests.pretrain.helpers import MODEL, small_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(small_config(), tmp_path_factory.mktemp("cache"))


def trained(config: PretrainConfig, corpus: Corpus) -> TrainState:
    with pycomm.init() as comm:
        state = build_state(comm, config)
        train(comm, config, corpus, state)
    return state


def weights_and_moments(state: TrainState) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in state.model.named_parameters():
        found[name] = parameter.detach().clone()
    for number, moments in state.optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            found[f"{number}.{key}"] = value.clone()
    return found


def test_a_checkpoint_brings_back_every_bit(tmp_path: Path, corpus: Corpus) -> None:
    config = small_config(steps=3)
    state = trained(config, corpus)
    path = checkpoint.save(tmp_path, state, config, corpus.key)
    expected, rng = weights_and_moments(state), torch.get_rng_state()
    torch.rand(1)
    with pycomm.init() as comm:
        fresh = build_state(comm, small_config(steps=3, seed=77))
        checkpoint.load(path, comm, fresh)
    assert fresh.step == 3
    assert torch.equal(torch.get_rng_state(), rng)
    found = weights_and_moments(fresh)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_leftovers_are_ignored_and_removed(tmp_path: Path, corpus: Corpus) -> None:
    config = small_config(steps=1)
    state = trained(config, corpus)
    leftover = tmp_path / "step_000009.tmp"
    leftover.mkdir()
    (leftover / "info.json").write_text("{}")
    with pytest.raises(ConfigError, match="no checkpoint"):
        checkpoint.find(str(tmp_path), tmp_path)
    path = checkpoint.save(tmp_path, state, config, corpus.key)
    assert not leftover.exists()
    assert checkpoint.find(str(tmp_path), tmp_path) == path
    assert checkpoint.save(tmp_path, state, config, corpus.key) == path, "the same step again replaces it"


def test_a_failed_save_keeps_the_last_checkpoint(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(steps=1)
    state = trained(config, corpus)
    good = checkpoint.save(tmp_path, state, config, corpus.key)

    def disk_full(*args: object, **kwargs: object) -> None:
        (Path(str(kwargs["checkpoint_id"])) / "__0_0.distcp").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(dcp, "save", disk_full)
    state.step = 2
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, state, config, corpus.key)
    assert checkpoint.find(str(tmp_path), tmp_path) == good


def test_the_newest_are_kept(tmp_path: Path, corpus: Corpus) -> None:
    config = small_config(steps=1, run=RunConfig(keep=2))
    state = trained(config, corpus)
    for step in (5, 999_999, 1_000_000, 1_000_001):
        state.step = step
        checkpoint.save(tmp_path, state, config, corpus.key)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1000000", "step_1000001"]
    assert (tmp_path / "latest").resolve().name == "step_1000001"


def test_what_resume_accepts(tmp_path: Path, corpus: Corpus) -> None:
    config = small_config(steps=1)
    state = trained(config, corpus)
    assert checkpoint.find("auto", tmp_path / "run") is None
    first = checkpoint.save(tmp_path / "run" / "checkpoints", state, config, corpus.key)
    (tmp_path / "run-other" / "checkpoints").mkdir(parents=True)
    for given in (first, first.parent, first.parent / "latest", tmp_path / "run", "auto"):
        assert checkpoint.find(str(given), tmp_path / "run") == first
    second = checkpoint.save(tmp_path / "run-2" / "checkpoints", state, config, corpus.key)
    assert checkpoint.find("auto", tmp_path / "run") == second
    with pytest.raises(ConfigError, match="no checkpoint"):
        checkpoint.find(str(tmp_path / "nowhere"), tmp_path / "run")


def test_what_does_not_fit_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    config = small_config(steps=2)
    state = trained(config, corpus)
    info = checkpoint.read_info(checkpoint.save(tmp_path, state, config, corpus.key))
    longer = dataclasses.replace(config, steps=5)
    wider = dataclasses.replace(longer, model=dataclasses.replace(MODEL, hidden=64))
    with pytest.raises(ConfigError, match="another model: hidden 32 -> 64"):
        checkpoint.check_fits(info, wider, corpus.key)
    with pytest.raises(ConfigError, match="other tokens"):
        checkpoint.check_fits(info, longer, "0" * 24)
    with pytest.raises(ConfigError, match="2 steps already"):
        checkpoint.check_fits(info, config, corpus.key)
    assert checkpoint.check_fits(info, longer, corpus.key) == ["steps 2 -> 5"]
    changed = dataclasses.replace(longer, seed=4, optim=dataclasses.replace(config.optim, lr=0.25))
    assert checkpoint.check_fits(info, changed, corpus.key) == ["optim.lr 0.5 -> 0.25", "seed 0 -> 4", "steps 2 -> 5"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "info.json").write_text('{"format": 99}')
    with pytest.raises(ConfigError, match="format 99"):
        checkpoint.read_info(tmp_path)
