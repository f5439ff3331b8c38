"""Every setting of a pretraining run, and the presets.

The dataclasses are the command line too: ``pycomm pretrain`` makes a flag of each field (``--steps``, ``--optim.lr``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import tyro

from pycomm.models.gpt import GPTConfig


class PretrainError(RuntimeError):
    """A run cannot start or go on, for a reason that the message tells in full; no traceback is needed."""


class NonFiniteError(PretrainError):
    """The loss or the gradient is not finite. Both are shared, so every rank raises this at the same step."""


class ConfigError(PretrainError, ValueError):
    """Settings or inputs of a run that do not fit, with what to do about it."""


@dataclass(frozen=True)
class DataConfig:
    """Text, tokens, and what is held out."""

    max_text_mb: float = 12.0
    """Use at most so many megabytes (10^6 bytes) of text, chosen in a fixed shuffled order; 0: all of it."""
    held_out: float = 0.05
    """Share of the tokens kept for validation, cut between documents where that is possible."""
    val_sequences: int = 64
    """Sequences of held-out text that one validation looks at; all of them if there are fewer."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 5e-3
    """Highest learning rate, reached at the end of the warm-up."""
    min_lr_ratio: float = 0.1
    """The last step's learning rate over the highest."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""


@dataclass(frozen=True)
class RunConfig:
    """How often things happen, and what is left behind."""

    val_every: int = 100
    """Steps between validations; the last step always validates."""
    save_every: int = 250
    """Steps between checkpoints; the last step always saves."""
    keep: int = 2
    """Checkpoints kept; older ones of the same run are deleted."""
    sample_tokens: int = 200
    """Length of the text that is generated at the end; 0: none."""
    sample_prompt: str = ""
    """What the generated text starts with; empty: the start of a document."""
    temperature: float = 0.7
    """Of the sampling; 0: always the likeliest token."""
    bucket_mb: float = 25.0
    """Size of a gradient bucket in megabytes."""
    timeout_s: float = 600.0
    """How long a worker waits for another before it gives up, in seconds."""
    peak_tflops: float | None = None
    """Peak of one worker's device in 10^12 flop/s, to report the share of it that is used (mfu)."""


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run."""

    preset: tyro.conf.Positional[Literal["tiny"]] = "tiny"
    """Where the defaults come from."""
    nproc: int = 2
    """Workers to start on this machine (ignored inside torchrun, which has started them already)."""
    dp: int | None = None
    """Data-parallel ranks; default: all workers."""
    pp: int = 1
    """Pipeline stages; this version has 1."""
    tp: int = 1
    """Tensor-parallel ranks; this version has 1."""
    zero: Literal[0, 1, 2] = 1
    """What the data-parallel ranks divide: 0 nothing, 1 the optimizer's states, 2 the gradients too (ZeRO)."""
    steps: int = 600
    """Optimizer steps of the whole run, those before a resume included."""
    out: Path | None = None
    """Folder of the run; default: out/pretrain-PRESET. If it holds a run already, a numbered one beside it."""
    resume: str | None = None
    """Continue from a checkpoint's folder, a run's folder, or the newest run of --out ("auto")."""
    json: Path | None = None
    """Write the metrics there too, as JSON lines (the run's own are in OUT/metrics.jsonl)."""
    text: tuple[Path, ...] = ()
    """Files or folders of UTF-8 text; default: the Python standard library's sources."""
    seed: int = 0
    """Of the initial weights, the order of the data and the sample."""
    global_batch: int = 16
    """Sequences a step, over all workers."""
    micro_batch: int = 4
    """Sequences that a worker computes at once; the rest is accumulated."""
    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def out_dir(self) -> Path:
        """The folder asked for; the run may get a numbered one beside it."""
        return self.out if self.out is not None else Path("out") / f"pretrain-{self.preset}"

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each worker computes in a step."""
        return self.global_batch // (world_size * self.micro_batch)

    def validate(self, world_size: int) -> None:
        """Check that the settings fit each other and ``world_size`` workers.

        Raises:
            ConfigError: one does not.
        """
        if self.pp != 1 or self.tp != 1:
            raise ConfigError(
                f"--pp {self.pp} --tp {self.tp}: this version of pycomm pretrain does data parallel only, "
                "so both must be 1"
            )
        if self.dp is not None and self.dp != world_size:
            raise ConfigError(
                f"--dp {self.dp} with {world_size} workers: this version of pycomm pretrain does data parallel only, "
                "so --dp must equal the number of workers (--nproc)"
            )
        _at_least(1, self, "steps", "global_batch", "micro_batch")
        _at_least(0, self, "seed")
        _at_least(0, self.data, "max_text_mb")
        _at_least(1, self.data, "val_sequences")
        _at_least(1, self.run, "val_every", "save_every", "keep")
        _at_least(0, self.run, "sample_tokens", "temperature")
        _at_least(0, self.optim, "lr", "warmup_steps", "weight_decay", "clip")
        if not 0 < self.data.held_out < 1:
            raise ConfigError(f"--data.held-out must lie between 0 and 1, got {self.data.held_out}")
        if self.run.timeout_s <= 0:
            raise ConfigError(f"--run.timeout-s must be positive, got {self.run.timeout_s}")
        if self.model.vocab_size < 300:
            raise ConfigError(
                f"--model.vocab-size must be at least 300 (256 bytes, the document mark and some merges), "
                f"got {self.model.vocab_size}"
            )
        if self.global_batch % (world_size * self.micro_batch):
            raise ConfigError(
                f"--global-batch {self.global_batch} is not a multiple of {world_size} workers * --micro-batch "
                f"{self.micro_batch} = {world_size * self.micro_batch}"
            )

    def to_json(self) -> dict[str, object]:
        """The settings as JSON types, for a checkpoint."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


PRESETS: Mapping[str, PretrainConfig] = MappingProxyType(
    # Small buckets, so that the small model has several and communication can overlap with backward.
    {"tiny": PretrainConfig(run=RunConfig(bucket_mb=1.0))}
)


def _at_least(least: float, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
