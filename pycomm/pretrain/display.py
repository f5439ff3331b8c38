"""What people see of a run: a live table on a terminal, a plain line now and then elsewhere, a picture in the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pycomm.pretrain.loop import StepRecord

PLAIN_EVERY_S = 5.0


class Display:
    """Shows the progress of a run. A context manager: leaving it gives the terminal back as it was.

    Args:
        console: where to write. On a terminal the display is live; else a line appears every few seconds.
        total: steps of the whole run.
        done: steps that a resumed run has behind it.
    """

    def __init__(self, console: Console, total: int, done: int = 0) -> None:
        self._console = console
        self._total = total
        self._last_line_s = -PLAIN_EVERY_S
        self._began_s = time.monotonic()
        self._done_before = done
        self._val_loss: float | None = None
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("train", total=total, completed=done)
        self._live = Live(self._progress, console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, record: StepRecord) -> None:
        """Show a step's numbers."""
        if record.val_loss is not None:
            self._val_loss = record.val_loss
        self._progress.update(self._task, completed=record.step)
        if self._live is not None:
            self._live.update(Group(self._progress, self._table(record)))
        elif self._line_is_due(record):
            self._last_line_s = time.monotonic()
            self._console.print(self._line(record), highlight=False, soft_wrap=True)

    def _line_is_due(self, record: StepRecord) -> bool:
        waited = time.monotonic() - self._last_line_s
        return waited >= PLAIN_EVERY_S or record.val_loss is not None or record.step == self._total

    def _line(self, record: StepRecord) -> str:
        val = f"  val {record.val_loss:.3f}" if record.val_loss is not None else ""
        eta_s = (time.monotonic() - self._began_s) / (record.step - self._done_before) * (self._total - record.step)
        return (
            f"step {record.step}/{self._total}  loss {record.loss:.3f}{val}  {record.tokens_per_s:,.0f} tokens/s  "
            f"exposed communication {record.exposed_comm_ms:.1f} ms  ETA {eta_s:.0f} s"
        )

    def _table(self, record: StepRecord) -> Table:
        cells = {
            "loss": f"{record.loss:.3f}",
            "validation": "-" if self._val_loss is None else f"{self._val_loss:.3f}",
            "tokens/s": f"{record.tokens_per_s:,.0f}",
            "exposed comm": f"{record.exposed_comm_ms:.1f} ms",
            "grad norm": f"{record.grad_norm:.2f}",
            "learning rate": f"{record.lr:.2e}",
        }
        if record.mfu is not None:
            cells["MFU"] = f"{record.mfu:.1%}"
        table = Table(box=None, pad_edge=False)
        for name in cells:
            table.add_column(name, justify="right", min_width=len(name))
        table.add_row(*cells.values())
        return table


def plot_loss(records: Sequence[StepRecord], path: Path, title: str) -> None:
    """Draw training and validation loss over the steps.

    Args:
        records: steps of the run, at least one.
        path: the PNG to write.
        title: stands above the picture.
    """
    # A figure of its own, not pyplot's: no global state and no need for a display.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([record.step for record in records], [record.loss for record in records], lw=1, label="training")
    validated = [(record.step, record.val_loss) for record in records if record.val_loss is not None]
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", ms=4, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
