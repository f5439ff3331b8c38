"""The run's folder and what people see of it: rank 0's side of a pretraining run.

The folder has ``metrics.jsonl`` (one JSON object a step), ``tokenizer.json``, ``checkpoints/`` (see ``checkpoint``)
and, at the end, ``loss.png`` and ``sample.txt``.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console

from pycomm.pretrain import checkpoint
from pycomm.pretrain.config import ConfigError, PretrainConfig
from pycomm.pretrain.data import Corpus
from pycomm.pretrain.display import Display, plot_loss
from pycomm.pretrain.files import file_errors
from pycomm.pretrain.loop import StepRecord, TrainState

METRICS = "metrics.jsonl"


class Run:
    """Files and display of a run. A context manager around the training; only rank 0 has one.

    Args:
        config: of the run.
        corpus: its text, for the tokenizer.
        resumed: the checkpoint that it continues, if any.
        state: of the training, after the checkpoint was loaded.
        console: where to write.
    """

    def __init__(
        self, config: PretrainConfig, corpus: Corpus, resumed: Path | None, state: TrainState, console: Console
    ) -> None:
        self.config = config
        self.corpus = corpus
        self.console = console
        self.last_checkpoint = resumed
        with self._file_errors():
            self.folder, earlier = _run_dir(config, resumed, state.step)
            (self.folder / "tokenizer.json").write_text(corpus.tokenizer.to_str(pretty=True), encoding="utf-8")
            self._metrics = MetricsFile(self.folder / METRICS, earlier)
        self._copy = None
        if config.json is not None and config.json.resolve() != (self.folder / METRICS).resolve():
            with self._copy_errors():
                self._copy = MetricsFile(config.json, earlier)
        self._display = Display(console, config.steps, state.step)
        asked_for = config.out_dir()
        why = "" if self.folder == asked_for or resumed else f" ({asked_for} holds a run already, which is kept)"
        self.say(f"run folder: {self.folder}{why}")

    def __enter__(self) -> Run:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)
        self._metrics.close()
        if self._copy is not None:
            self._copy.close()
        if error is not None:
            self._say_where_to_go_on("training stopped", None)

    def say(self, text: str) -> None:
        """Print a line above the live display."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, record: StepRecord) -> None:
        """Record and show a step."""
        with self._file_errors():
            self._metrics.write(record)
        if self._copy is not None:
            with self._copy_errors():
                self._copy.write(record)
        self._display.step(record)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint."""
        with self._file_errors():
            self.last_checkpoint = checkpoint.save(self.folder / "checkpoints", state, self.config, self.corpus.key)

    def conclude_stopped(self, step: int, resume_command: str) -> None:
        """Say where a run that was asked to stop can go on."""
        self._say_where_to_go_on(f"stopped after step {step}", resume_command)

    def conclude_finished(self, state: TrainState) -> None:
        """Generate text, draw the loss curve, and say what is where."""
        records = read_metrics(self.folder / METRICS)
        title = f"{self.config.preset}: {state.model.num_parameters():,} parameters"
        with self._file_errors():
            plot_loss(records, self.folder / "loss.png", title)
        if self.config.run.sample_tokens:
            sample = generate_text(self.config, self.corpus, state)
            with self._file_errors():
                (self.folder / "sample.txt").write_text(sample, encoding="utf-8")
            self.console.rule("generated text")
            self.say(sample)
            self.console.rule()
        first, last = records[0], records[-1]
        held_out = "" if last.val_loss is None else f"; held-out text {last.val_loss:.3f}"
        speed = statistics.median(record.tokens_per_s for record in records)
        self.say(
            f"loss {first.loss:.3f} -> {last.loss:.3f} ({last.loss / first.loss:.0%} of the first){held_out}; "
            f"{speed:,.0f} tokens/s (median)"
        )
        self.say(f"checkpoint: {self.last_checkpoint}")
        self.say(f"loss curve: {self.folder / 'loss.png'}")
        self.say(f"metrics:    {self.folder / METRICS}")

    def _file_errors(self) -> AbstractContextManager[None]:
        return file_errors(f"the run's folder (--out {self.config.out_dir()})", "make room, or give another --out")

    def _copy_errors(self) -> AbstractContextManager[None]:
        return file_errors(f"--json {self.config.json}", "give a file that can be written")

    def _say_where_to_go_on(self, what: str, resume_command: str | None) -> None:
        if self.last_checkpoint is None:
            self.say(f"{what}; there is no checkpoint yet")
            return
        self.say(f"{what}; checkpoint: {self.last_checkpoint}")
        self.say(f"go on with: {resume_command or 'pycomm pretrain'} --resume {self.last_checkpoint}")


def generate_text(config: PretrainConfig, corpus: Corpus, state: TrainState) -> str:
    """A sample of what the model has learned; the same for the same weights and seed."""
    prompt = [corpus.document_start, *corpus.tokenizer.encode(config.run.sample_prompt).ids]
    generator = torch.Generator().manual_seed(config.seed)
    ids = state.model.generate(
        torch.tensor(prompt), config.run.sample_tokens, temperature=config.run.temperature, generator=generator
    )
    text: str = corpus.tokenizer.decode(ids.tolist())
    return text


def _run_dir(config: PretrainConfig, resumed: Path | None, step: int) -> tuple[Path, list[StepRecord]]:
    """The run's folder, and the metrics of the steps before this start.

    A resumed run goes on in its folder, unless it starts from an older checkpoint than the folder's newest, or --out
    names another place: then it gets a new one, since going on would overwrite later results.
    """
    if resumed is None:
        return claim_run_dir(config.out_dir()), []
    old = resumed.parent.parent
    earlier = read_metrics(old / METRICS, step)
    is_newest = (resumed.parent / "latest").resolve() == resumed.resolve()
    base = re.escape(str(config.out_dir().resolve()))
    is_there = config.out is None or re.fullmatch(rf"{base}(-\d+)?", str(old.resolve())) is not None
    if is_newest and is_there and (old / METRICS).is_file():
        return old, earlier
    return claim_run_dir(config.out_dir()), earlier


class MetricsFile:
    """Appends one JSON object a step; each line is in the file when ``write`` returns, or nothing of it.

    Args:
        path: the file; replaced in one instant, so that a kill meanwhile leaves the old one. Its folder is created. A
            pipe or a device is written into.
        earlier: steps before a resume, written first.
    """

    def __init__(self, path: Path, earlier: Iterable[StepRecord] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path = path.resolve()  # of a link the target is replaced, not the link
        self._is_regular = path.is_file() or not path.exists()
        new = path.with_name(path.name + ".tmp") if self._is_regular else path
        self._file = new.open("wb", buffering=0)
        for record in earlier:
            self.write(record)
        if self._is_regular:
            os.fsync(self._file.fileno())
            new.replace(path)

    def write(self, record: StepRecord) -> None:
        """Append one step."""
        line = memoryview((json.dumps(record.to_json()) + "\n").encode())
        before = self._file.tell() if self._is_regular else 0
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            if self._is_regular:
                self._file.seek(before)
                self._file.truncate()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path, last_step: int | None = None) -> list[StepRecord]:
    """Steps of a metrics file up to ``last_step``; none if there is no file. A half-written last line is left out.

    Raises:
        ConfigError: another line does not read as a step's metrics.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = StepRecord(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: no metrics of a step ({error}); remove that line") from error
        if last_step is None or record.step <= last_step:
            records.append(record)
    return records


def claim_run_dir(out_dir: Path) -> Path:
    """A folder for a new run that holds no other: ``out_dir``, else ``out_dir-2``, ``out_dir-3``, …

    The metrics file marks a folder as taken. It is created in the same instant as it is looked for, so two runs that
    start together get two folders.
    """
    number = 1
    while True:
        candidate = out_dir if number == 1 else out_dir.with_name(f"{out_dir.name}-{number}")
        candidate.mkdir(parents=True, exist_ok=True)
        try:
            (candidate / METRICS).open("x").close()
        except FileExistsError:
            number += 1
        else:
            return candidate
