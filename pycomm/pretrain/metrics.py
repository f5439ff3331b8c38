"""Metrics of a run as JSON lines, and the folder they lie in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pycomm.pretrain.loop import StepRecord

METRICS = "metrics.jsonl"


class MetricsFile:
    """Appends one JSON object a step; each line is in the file when ``write`` returns.

    Args:
        path: the file; replaced, its folder created.
        earlier: steps before a resume, written first.
    """

    def __init__(self, path: Path, earlier: Iterable[StepRecord] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=1)
        for record in earlier:
            self.write(record)

    def write(self, record: StepRecord) -> None:
        """Append one step."""
        self._file.write(json.dumps(record.to_json()) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path, last_step: int | None = None) -> list[StepRecord]:
    """Steps of a metrics file up to ``last_step``; none if there is no file. A half-written last line is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            record = StepRecord(**json.loads(line))
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
