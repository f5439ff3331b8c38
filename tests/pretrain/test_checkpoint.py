"""Checkpoints: complete or absent, exact, and refused where they do not fit."""

import contextlib
import dataclasses
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import pycomm
from pycomm.pretrain import ConfigError, PretrainConfig, RunConfig, TrainState, build_state, checkpoint, train
from pycomm.pretrain.config import PretrainError
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


def outcome_of_loading(path: Path, state: TrainState, expected: dict[str, torch.Tensor]) -> str:
    """ "refused", "same", or what came instead."""
    try:
        checkpoint.read_info(path)
        with pycomm.init() as comm:
            checkpoint.load(path, comm, state)
    except PretrainError as error:
        return "refused" if "is damaged" in str(error) else f"{type(error).__name__}: {error}"
    except (Exception, CheckpointException) as error:  # noqa: BLE001  (whatever torch and json make of damaged files)
        return f"{type(error).__name__}: {error}"
    found = weights_and_moments(state)
    return "same" if all(torch.equal(found[name], value) for name, value in expected.items()) else "other values"


def test_damage_is_never_taken_for_a_checkpoint(tmp_path: Path, corpus: Corpus) -> None:
    """Catches flipped bits, cut and missing files that load with other values, or fail with whatever torch says."""
    state = trained(small_config(steps=1), corpus)
    path = checkpoint.save(tmp_path, state, small_config(steps=1), corpus.key)
    expected = weights_and_moments(state)
    whole = {file: file.read_bytes() for file in sorted(path.iterdir())}
    generator = random.Random(1)
    outcomes = {}
    for file, content in whole.items():
        damaged = {f"bit {bit}": flipped(content, bit) for bit in generator.sample(range(8 * len(content)), 14)}
        damaged |= {"half": content[: len(content) // 2], "all but the end": content[:-1], "emptied": b""}
        for what, instead in damaged.items():
            file.write_bytes(instead)
            outcomes[file.name, what] = outcome_of_loading(path, state, expected)
        file.unlink()
        outcomes[file.name, "gone"] = outcome_of_loading(path, state, expected)
        file.write_bytes(content)
    wrong = [f"{place}: {outcome[:80]}" for place, outcome in outcomes.items() if outcome not in ("refused", "same")]
    assert not wrong, "\n".join(wrong)
    assert list(outcomes.values()).count("refused") > 50
    assert outcome_of_loading(path, state, expected) == "same", "nothing was damaged any more"


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_damage_is_named_with_what_to_resume_from(tmp_path: Path, corpus: Corpus) -> None:
    config = small_config(steps=1, run=RunConfig(keep=3))
    state = trained(config, corpus)
    paths = []
    for state.step in (1, 2, 3):
        paths.append(checkpoint.save(tmp_path, state, config, corpus.key))
    for path in paths[1:]:
        (path / "__0_0.distcp").write_bytes(b"something else")
    with pycomm.init() as comm:
        with pytest.raises(PretrainError, match=f"__0_0.distcp.*--resume {paths[0]}"):
            checkpoint.load(checkpoint.find(str(tmp_path), tmp_path) or Path(), comm, state)
        (paths[0] / "info.json").unlink()
        with pytest.raises(PretrainError, match="info.json is missing.*no intact"):
            checkpoint.read_info(checkpoint.find(str(paths[0]), tmp_path) or Path())


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the code under test catches it."""


CHANGES = ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir")  # of the names in folders, one at a time


def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half-deleted folders that look like checkpoints, and a `latest` that names nothing."""
    config = small_config(steps=1, run=RunConfig(keep=2))
    state = trained(config, corpus)
    original = tmp_path / "original"
    for state.step in (1, 2):
        names = {file.name for file in checkpoint.save(original, state, config, corpus.key).iterdir()}
    saved = {name: (original / "latest" / name).read_bytes() for name in names}

    def write_the_same(*args: object, **kwargs: object) -> None:
        for name in names - {"info.json", "SHA256SUMS"}:
            (Path(str(kwargs["checkpoint_id"])) / name).write_bytes(saved[name])

    monkeypatch.setattr(dcp, "save", write_the_same)
    num_moments = 0
    for state.step in (3, 2):  # 3: the oldest is pruned; 2: the newest is replaced
        for moment in itertools.count():
            folder = tmp_path / f"step{state.step}-moment{moment}"
            shutil.copytree(original, folder, symlinks=True)
            with monkeypatch.context() as patch:
                countdown = kill_at(patch, moment)
                with contextlib.suppress(Killed):
                    checkpoint.save(folder, state, config, corpus.key)
            found = checkpoint.find(str(folder), folder)
            assert found is not None
            for path in folder.glob("step_*"):
                assert path.suffix or {file.name for file in path.iterdir()} == names, (state.step, moment, path)
            assert {file.name for file in found.iterdir()} == names, (state.step, moment)
            checkpoint.save(folder, state, config, corpus.key)
            left = {path.name for path in folder.iterdir()}
            assert left == {"latest", "step_000002", "step_000003" if state.step == 3 else "step_000001"}, moment
            if countdown:
                break
            num_moments += 1
    assert num_moments > 20


def kill_at(patch: pytest.MonkeyPatch, moment: int) -> list[int]:
    """Let the change number ``moment`` of a folder not happen, nor anything after it; empty if it was reached."""
    left = [*range(moment + 1)]

    def before(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*args: object, **kwargs: object) -> None:
            if left:
                left.pop()
            if not left:
                raise Killed
            change(*args, **kwargs)

        return changed

    for name in CHANGES:
        patch.setattr(os, name, before(getattr(os, name)))
    return left


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


def test_another_format_is_refused(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        path = checkpoint.save(tmp_path, trained(config, corpus), config, corpus.key)
    with pytest.raises(ConfigError, match="format 99"):
        checkpoint.read_info(path)
