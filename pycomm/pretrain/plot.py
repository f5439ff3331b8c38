"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pycomm.pretrain.loop import StepRecord


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
