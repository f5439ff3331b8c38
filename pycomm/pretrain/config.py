"""Every setting of a pretraining run, and the presets.

The dataclasses are the command line too: ``pycomm pretrain`` makes a flag of each field (``--steps``, ``--optim.lr``).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import tyro

from pycomm import _C
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
        folder = self.out if self.out is not None else Path("out") / f"pretrain-{self.preset}"
        return folder if folder.name not in ("", "..") else folder.resolve()  # "." has no name to put a number behind

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each worker computes in a step."""
        return self.global_batch // (world_size * self.micro_batch)

    def validate(self, world_size: int) -> None:
        """Check that the settings fit each other and ``world_size`` workers.

        Raises:
            ConfigError: one does not.
        """
        for prefix in ("", "model.", "data.", "optim.", "run."):
            _check_ranges(getattr(self, prefix[:-1]) if prefix else self, prefix)
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
        if 0 < self.run.temperature < 1e-3:
            raise ConfigError(f"--run.temperature must be 0 or at least 0.001, got {self.run.temperature}")
        if self.global_batch % (world_size * self.micro_batch):
            raise ConfigError(
                f"--global-batch {self.global_batch} is not a multiple of {world_size} workers * --micro-batch "
                f"{self.micro_batch} = {world_size * self.micro_batch}"
            )
        self._check_memory()
        self._check_names()

    def _check_memory(self) -> None:
        shape = self.model
        weights = shape.num_layers * (4 + 2 * shape.mlp_ratio) * shape.hidden**2 + shape.vocab_size * shape.hidden
        logits = self.micro_batch * shape.max_seq * shape.vocab_size
        least_bytes = 4 * 2 * (weights + logits)  # fp32, each with its gradient
        present_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if least_bytes > present_bytes:
            raise ConfigError(
                f"a model of {weights:,} weights and a micro-batch of {logits:,} scores take at least "
                f"{least_bytes / 2**30:,.0f} GiB with their gradients, and this machine has "
                f"{present_bytes / 2**30:,.0f}; choose a smaller model (--model.hidden, --model.num-layers, "
                "--model.vocab-size, --model.max-seq) or a smaller --micro-batch"
            )

    def _check_names(self) -> None:
        """Names that what we use, or a terminal, could not write; --text may have any."""
        named = {"--out": self.out, "--json": self.json, "--resume": self.resume}
        for flag, value in {**named, "--run.sample-prompt": self.run.sample_prompt}.items():
            if value is not None and not _is_text(str(value)):
                raise ConfigError(f"{flag} {printable(str(value))}: it is not UTF-8; give another")
        if not self.out_dir().name:
            raise ConfigError(f"--out {self.out}: the root folder cannot be a run's; name a folder in it")

    def check_files(self) -> None:
        """Check what can be known of the files before anything starts; the rest is told when they are used.

        Raises:
            ConfigError: a text does not exist, or a file or folder is in the way of one that would be written.
        """
        for path in self.text:
            if not os.path.isfile(path) and not os.path.isdir(path):  # False of names too long as well
                raise ConfigError(f"--text {printable(str(path))}: no such file or folder")
        _check_folder("--out", self.out_dir())
        if self.json is not None:
            if os.path.isdir(self.json):
                raise ConfigError(f"--json {self.json}: it is a folder; name a file in it")
            _check_folder("--json", self.json.parent)

    def to_json(self) -> dict[str, object]:
        """The settings as JSON types, for a checkpoint."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


PRESETS: Mapping[str, PretrainConfig] = MappingProxyType(
    # Small buckets, so that the small model has several and communication can overlap with backward.
    {"tiny": PretrainConfig(run=RunConfig(bucket_mb=1.0))}
)


_MOST = 2**31 - 1  # a number of things, beyond all that can be had, and small enough for every type underneath
# What a flag may be, both ends included. All ends are finite, so infinity and NaN are outside.
_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "nproc": (1, _C.MAX_RANKS),
        "zero": (0, 2),
        **dict.fromkeys(("steps", "global-batch", "micro-batch"), (1, _MOST)),
        "seed": (0, 2**63 - 1),
        "model.vocab-size": (300, _MOST),  # 256 bytes, the document mark and some merges
        **dict.fromkeys(("model.max-seq", "model.num-heads", "model.hidden", "model.mlp-ratio"), (1, _MOST)),
        "model.num-layers": (1, 100_000),
        "data.max-text-mb": (0, 1e9),
        "data.held-out": (math.nextafter(0, 1), math.nextafter(1, 0)),
        "data.val-sequences": (1, _MOST),
        "optim.lr": (0, 1e6),
        "optim.min-lr-ratio": (0, 1),
        "optim.warmup-steps": (0, _MOST),
        "optim.weight-decay": (0, 1e6),
        **dict.fromkeys(("optim.beta1", "optim.beta2"), (0, math.nextafter(1, 0))),
        **dict.fromkeys(("optim.eps", "optim.clip"), (0, 1e30)),
        **dict.fromkeys(("run.val-every", "run.save-every", "run.keep"), (1, _MOST)),
        "run.sample-tokens": (0, 1_000_000),
        "run.temperature": (0, 1e6),
        "run.bucket-mb": (1e-6, 1e6),
        "run.timeout-s": (1e-3, 1e9),
        "run.peak-tflops": (1e-6, 1e9),
    }
)


def _check_ranges(settings: object, prefix: str) -> None:
    for name, value in vars(settings).items():
        flag = prefix + name.replace("_", "-")
        if flag in _RANGES and value is not None:
            least, most = _RANGES[flag]
            if not least <= value <= most:  # nor is NaN
                raise ConfigError(f"--{flag} must be from {_number(least)} to {_number(most)}, got {value}")


def _check_folder(flag: str, folder: Path) -> None:
    """The folder is there or can be made, as far as its parents tell."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        raise ConfigError(f"{flag}: {there} is no folder, so there can be no folder {folder}; give another {flag}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag}: you may not write into the folder {there}; give another {flag}")


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    near = round(value, 12)
    return f"{value:g}" if near == value else f"just {'above' if value > near else 'below'} {near:g}"


def _is_text(text: str) -> bool:
    return "\0" not in text and text == printable(text)


def printable(text: str) -> str:
    """The text with what is not Unicode (of a file's name, say) written as \\udcff."""
    return text.encode(errors="backslashreplace").decode()


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
