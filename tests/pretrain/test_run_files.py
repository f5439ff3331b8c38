"""Files of a run: metrics, folders, the picture, and what the display writes."""

import io
import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from pycomm.pretrain import ConfigError
from pycomm.pretrain.display import Display, plot_loss
from pycomm.pretrain.loop import StepRecord
from pycomm.pretrain.run import MetricsFile, claim_run_dir, read_metrics

KEYS = ["step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "exposed_comm_ms"]


def record(step: int, val_loss: float | None = None) -> StepRecord:
    return StepRecord(step, 8.0 / step, 1e-3, 0.5, 1000.0, None, 1.5, val_loss)


def test_metrics_have_the_agreed_keys(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "new" / "m.jsonl")
    metrics.write(record(1))
    metrics.write(record(2, 7.0))
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "new" / "m.jsonl").read_text().splitlines()]
    assert list(rows[0]) == KEYS
    assert list(rows[1]) == [*KEYS, "val_loss"]
    assert rows[0]["mfu"] is None
    assert read_metrics(tmp_path / "new" / "m.jsonl") == [record(1), record(2, 7.0)]


def test_rows_are_in_the_file_at_once_and_a_torn_one_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    metrics = MetricsFile(path, [record(1), record(2)])
    metrics.write(record(3))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert read_metrics(path) == [record(1), record(2), record(3)]
    assert read_metrics(path, last_step=2) == [record(1), record(2)]
    assert read_metrics(tmp_path / "none") == []
    metrics.close()


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the code under test does comes after it."""


@pytest.mark.parametrize("moment", ["first row", "second row", "rename"])
def test_a_kill_while_a_resume_rewrites_the_rows_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "m.jsonl"
    first = MetricsFile(path)
    for step in (1, 2, 3):
        first.write(record(step))
    first.close()
    calls = iter(["first row", "second row", "rename"])
    dumps = json.dumps

    def until_killed(row: object) -> str:
        if next(calls) == moment:
            raise Killed
        return dumps(row)

    def rename(source: Path, target: Path) -> None:
        raise Killed

    monkeypatch.setattr(json, "dumps", until_killed)
    monkeypatch.setattr(Path, "replace", rename)
    with pytest.raises(Killed):
        MetricsFile(path, read_metrics(path, 2))
    monkeypatch.undo()
    assert read_metrics(path) == [record(1), record(2), record(3)]
    resumed = MetricsFile(path, read_metrics(path, 2))
    resumed.write(record(3, 1.0))
    assert read_metrics(path) == [record(1), record(2), record(3, 1.0)]
    assert [found.name for found in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    metrics = MetricsFile(path, [record(1)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="File too large"):
            metrics.write(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.write(record(2))
    assert read_metrics(path) == [record(1), record(2)]


def test_devices_and_links_are_not_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("file")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link):
        MetricsFile(path, [record(1)]).close()
    assert json.loads(os.read(reader, 1000))["step"] == 1
    os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert read_metrics(tmp_path / "file") == [record(1)]


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for row in (b"{}\n", b"\xff\n", b"[1]\n"):
        path.write_bytes(json.dumps(record(1).to_json()).encode() + b"\n" + row)
        with pytest.raises(ConfigError, match=r"m.jsonl, line 2: no metrics of a step"):
            read_metrics(path)


def test_runs_never_share_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: claim_run_dir(tmp_path / "deep" / "run"), range(8)))
    assert len(set(folders)) == 8
    assert {path.name for path in folders} == {"run", *(f"run-{number}" for number in range(2, 9))}


@pytest.mark.parametrize("records", [[record(1)], [record(1), record(2, 3.5), record(3, 3.0)]])
def test_picture_is_a_png(tmp_path: Path, records: list[StepRecord]) -> None:
    plot_loss(records, tmp_path / "loss.png", "a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_plain_display_prints_first_validated_and_last_step() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=200), total=100) as display:
        for step in range(1, 101):
            display.step(record(step, 3.25 if step == 50 else None))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 1/100  loss 8.000")
    assert lines[-1].startswith("step 100/100")
    assert any("step 50/100" in line and "val 3.250" in line for line in lines)
    assert "exposed communication 1.5 ms" in lines[0]


def test_live_display_shows_the_numbers_and_gives_the_cursor_back() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    with Display(console, total=4, done=2) as display:
        display.step(record(3, 2.5))
    text = out.getvalue()
    for expected in ("loss", "validation", "2.500", "tokens/s", "exposed comm", "1.5 ms", "ETA", "3/4"):
        assert expected in text
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert text.count(hide) == 1
    assert text.rindex(show) > text.index(hide)
