"""Metrics of a run as JSON lines, and the folder they lie in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from pycomm.pretrain.config import ConfigError
from pycomm.pretrain.loop import StepRecord

METRICS = "metrics.jsonl"


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
