"""Checkpoints of a run: complete or absent, never half-written.

    RUN/checkpoints/step_000100/      weights and optimizer state (torch.distributed.checkpoint), info.json, SHA256SUMS
    RUN/checkpoints/latest            a link to the newest

A checkpoint is written as ``step_N.tmp``, flushed to the disk, renamed, and then ``latest`` is moved, each atomically:
after a crash or a power cut ``latest`` names a complete checkpoint. One that is to be deleted loses its name first, so
that no reader takes what is left of it for a checkpoint. ``SHA256SUMS`` (as ``sha256sum --check`` reads it) has the
checksums of all files, which are compared before anything in them is used. Parameters go by their names, so that a
later version with other layouts can read them. torch keeps a checkpoint's own index (``.metadata``) as a pickle, and
reading a pickle can run code: resume only from folders that you trust.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.pretrain.config import ConfigError, PretrainConfig, PretrainError
from pycomm.pretrain.files import checksum
from pycomm.pretrain.loop import TrainState

FORMAT = 2
_WRITER = 0  # the rank that writes and reads the files
_STEP_DIR = re.compile(r"step_(\d+)")
_INFO, _SUMS = "info.json", "SHA256SUMS"
_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")
_WRITTEN, _REPLACED, _DELETED = ".tmp", ".replaced", ".deleted"  # what is about to happen to a folder, after its name


class DamagedCheckpointError(PretrainError):
    """Files of a checkpoint are not those that were written; names the first, and a checkpoint to use instead."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What ``info.json`` says, readable before anything is unpickled."""

    path: Path
    step: int
    model: dict[str, object]
    corpus_key: str
    config: dict[str, object]


def save(folder: Path, state: TrainState, config: PretrainConfig, corpus_key: str) -> Path:
    """Write a checkpoint into ``folder`` and keep the newest ``config.run.keep``.

    Collective: rank 0 calls this, while all others call :func:`contribute`. Rank 0 alone holds whole optimizer states.

    Returns:
        The checkpoint's folder. One of the same step is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _restore_replaced(folder)
    _remove_leftovers(folder)
    final = folder / f"step_{state.step:06d}"
    work = final.with_suffix(_WRITTEN)
    work.mkdir()
    with _quiet():
        dcp.save(_saved(state), checkpoint_id=work, no_dist=True)
    info = {
        "format": FORMAT,
        "step": state.step,
        "model": asdict(config.model),
        "corpus_key": corpus_key,
        "config": config.to_json(),
    }
    (work / _INFO).write_text(json.dumps(info, indent=1))
    (work / _SUMS).write_text("".join(f"{checksum(path, 'sha256')}  {path.name}\n" for path in sorted(work.iterdir())))
    for path in [*work.iterdir(), work]:
        _flush(path)
    if final.exists():
        final.rename(final.with_suffix(_REPLACED))
    work.rename(final)
    _flush(folder)
    _point_latest(folder, final.name)
    for old in sorted(_complete(folder))[: -config.run.keep]:
        path = folder / f"step_{old:06d}"
        path.rename(path.with_suffix(_DELETED))
    _flush(folder)
    _remove_leftovers(folder)
    return final


def contribute(state: TrainState) -> None:
    """A rank's part in a checkpoint that rank 0 writes: its optimizer states. Collective."""
    state.optimizer.state_dict(root=_WRITER)


def load(path: Path, comm: Communicator, state: TrainState) -> None:
    """Set ``state`` to the checkpoint's. Collective: rank 0 reads the files, the others get the values from it.

    Args:
        path: the checkpoint's folder; used on rank 0.
        comm: all ranks of the run.
        state: an untrained one of the same model; changed in place.

    Raises:
        DamagedCheckpointError: on rank 0; nothing was read but checksums.
    """
    if comm.rank == _WRITER:
        _check_sums(path)
    progress, weights = _progress(state), _weights(state)
    num_steps = torch.zeros(())  # the same of all parameters
    shards = [
        (f"optim.{slot.name}.{key}", slot, shard, packed)
        for slot, shard, packed_by_key in state.optimizer.shards()
        for key, packed in packed_by_key.items()
    ]
    whole: dict[str, Tensor] = {}
    if comm.rank == _WRITER:
        whole = {name: torch.empty_like(slot.param, dtype=packed.dtype) for name, slot, _, packed in shards}
        steps = {f"optim.{shards[0][1].name}.step": num_steps}
        with _quiet():
            dcp.load({**progress, **weights, **steps, **whole}, checkpoint_id=path, no_dist=True)
    for tensor in (*progress.values(), *weights.values(), num_steps):
        comm.broadcast(tensor)
    # One after the other, and only this rank's shard is kept.
    for name, slot, shard, packed in shards:
        value = whole.pop(name) if name in whole else torch.empty_like(slot.param, dtype=packed.dtype)
        comm.broadcast(value)
        packed[shard.packed : shard.packed + len(shard)] = slot.in_memory_order(value)[shard.begin : shard.end]
    state.step = int(progress["progress.step"])
    state.optimizer.states_were_read(int(num_steps), [{} for _ in state.optimizer.param_groups])
    torch.set_rng_state(progress["progress.rng"])


def find(resume: str, out_dir: Path) -> Path | None:
    """The checkpoint that ``--resume`` means.

    Args:
        resume: a checkpoint's folder, a folder with a ``latest`` link, a run's folder, or "auto": the newest of the
            runs in ``out_dir`` and its numbered siblings.
        out_dir: base of the runs; for "auto".

    Returns:
        The checkpoint's folder; None if "auto" found none.

    Raises:
        ConfigError: there is no checkpoint at the place given.
    """
    if resume != "auto":
        found = _checkpoint_in(Path(resume))
        if found is None:
            raise ConfigError(f"--resume {resume}: no checkpoint there, nor under latest or checkpoints/latest in it")
        return found
    candidates = [found for run in _runs(out_dir) if (found := _checkpoint_in(run)) is not None]
    return max(candidates, key=lambda path: path.stat().st_mtime, default=None)


def read_info(path: Path) -> CheckpointInfo:
    """Read a checkpoint's ``info.json``.

    Raises:
        ConfigError: it was written by a version with another format.
        DamagedCheckpointError: it is not what was written.
    """
    _check_sums(path, _INFO)
    info = json.loads((path / _INFO).read_text())
    if info.get("format") != FORMAT:
        raise ConfigError(f"{path} has checkpoint format {info.get('format')}, this version reads {FORMAT}")
    return CheckpointInfo(path, info["step"], info["model"], info["corpus_key"], info["config"])


def check_fits(info: CheckpointInfo, config: PretrainConfig, corpus_key: str) -> list[str]:
    """Compare a checkpoint with the run that wants to continue it.

    Returns:
        Settings that differ but may: one line each, for people.

    Raises:
        ConfigError: the model's shape or the tokens differ, or no step is left.
    """
    differences = _differences(info.model, asdict(config.model))
    if differences:
        raise ConfigError(f"{info.path} holds another model: {'; '.join(differences)} (checkpoint's value first)")
    if info.corpus_key != corpus_key:
        raise ConfigError(
            f"{info.path} was trained on other tokens: its text or vocabulary is not this run's, so its weights mean "
            "other words; give the same --text and --data settings"
        )
    if info.step >= config.steps:
        raise ConfigError(f"{info.path} has {info.step} steps already; to go on, give --steps above that")
    wanted = config.to_json()
    notes = []
    for group in ("data", "optim"):
        before, now = info.config[group], wanted[group]
        if isinstance(before, dict) and isinstance(now, dict):
            notes += [f"{group}.{line}" for line in _differences(before, now)]
    top = ("seed", "global_batch", "steps")
    return notes + _differences({key: info.config[key] for key in top}, {key: wanted[key] for key in top})


def _differences(before: dict[str, object], now: dict[str, object]) -> list[str]:
    keys = sorted(before.keys() | now.keys())
    return [f"{key} {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)]


def _progress(state: TrainState) -> dict[str, Tensor]:
    """Copies of what is neither weight nor optimizer state."""
    return {
        "progress.step": torch.tensor([state.step], dtype=torch.int64),
        "progress.rng": torch.get_rng_state(),
    }


def _weights(state: TrainState) -> dict[str, Tensor]:
    """Weights by name; they share the model's memory. A tied weight goes by its parameter's one name."""
    return {f"model.{name}": parameter.detach() for name, parameter in state.model.named_parameters()}


def _saved(state: TrainState) -> dict[str, Tensor]:
    """All that is saved, by name. Collective; for rank 0."""
    tensors = {**_progress(state), **_weights(state)}
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    in_order = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    for number, states in state.optimizer.state_dict(root=_WRITER)["state"].items():
        tensors.update({f"optim.{names[id(in_order[number])]}.{key}": value for key, value in states.items()})
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    # torch warns that it saves or loads in one process alone, which is what it was asked to do.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _checkpoint_in(path: Path) -> Path | None:
    for candidate in (path, path / "latest", path / "checkpoints" / "latest"):
        _restore_replaced(candidate.parent)
        if any((candidate / name).is_file() for name in (_INFO, _SUMS)):
            return candidate.resolve()
    return None


def _runs(out_dir: Path) -> list[Path]:
    numbered = re.compile(re.escape(out_dir.name) + r"(-\d+)?")
    return [path for path in out_dir.parent.glob(f"{out_dir.name}*") if numbered.fullmatch(path.name)]


def _complete(folder: Path) -> list[int]:
    return [int(match[1]) for path in folder.iterdir() if (match := _STEP_DIR.fullmatch(path.name))]


def _restore_replaced(folder: Path) -> None:
    """Finish what a kill interrupted between the two renames of a checkpoint that is replaced by a newer one."""
    for path in folder.glob(f"step_*{_REPLACED}"):
        if not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))


def _remove_leftovers(folder: Path) -> None:
    for suffix in (_WRITTEN, _REPLACED, _DELETED):
        for path in folder.glob(f"step_*{suffix}"):
            shutil.rmtree(path)


def _check_sums(path: Path, only: str | None = None) -> None:
    """Compare a checkpoint's files, or one of them, with the checksums that were written with them.

    Raises:
        DamagedCheckpointError: they differ.
    """
    difference = _difference_from_sums(path, only)
    if difference is None:
        return
    steps = sorted((step for step in _complete(path.parent)), reverse=True)
    others = [path.parent / f"step_{step:06d}" for step in steps]
    earlier = others[others.index(path) + 1 :] if path in others else others
    intact = next((other for other in earlier if _difference_from_sums(other) is None), None)
    instead = (
        "there is no intact earlier one beside it" if intact is None else f"an intact one is there: --resume {intact}"
    )
    raise DamagedCheckpointError(f"the checkpoint {path} is damaged: {difference}; {instead}")


def _difference_from_sums(path: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint's files, or with one of them; None: nothing."""
    if not (path / _SUMS).is_file():
        return f"{_SUMS} is missing (or an early version wrote it, without checksums)"
    lines = [_SUM_LINE.fullmatch(line) for line in (path / _SUMS).read_bytes().decode("latin-1").splitlines()]
    sums = {line[2]: line[1] for line in lines if line is not None}
    if None in lines:
        return f"{_SUMS} has changed since it was written"
    read = {_INFO, ".metadata", *(file.name for file in path.glob("*.distcp"))}
    for name in [only] if only is not None else sorted(read | sums.keys()):
        if name not in sums:
            return f"{name} has no line in {_SUMS}"
        if not (path / name).is_file():
            return f"{name} is missing"
        if checksum(path / name, "sha256") != sums[name]:
            return f"{name} has changed since it was written"
    return None


def _point_latest(folder: Path, name: str) -> None:
    link = folder / "latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(folder / "latest")
    _flush(folder)


def _flush(path: Path) -> None:
    """Make the kernel write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
