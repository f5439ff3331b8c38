"""The picture of a run: time and bus bandwidth against size, every contender and the bound, a line of panels each
operation, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from contenders import BOUND, CONTENDERS
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from report import size_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from report import Row

_STYLES = {
    "pycomm": ("#0b62a4", "o"),
    "pycomm-ordinary": ("#5fa8dd", "s"),
    "gloo": ("#c0392b", "^"),
    "openmpi": ("#e08e0b", "v"),
    "mpich": ("#7d5ba6", "D"),
    "deepspeed": ("#2e8b57", "P"),
}


def draw(rows: Sequence[Row], host: dict[str, object], path: Path) -> None:
    """Write one picture of the operations in ``rows`` that have sizes; the suffix of ``path`` chooses the format."""
    rows = [row for row in rows if row.bytes > 0 and row.busbw_gbps > 0]
    if not rows:
        return
    operations = list(dict.fromkeys(row.op for row in rows))
    with mpl.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 0.6 + 4.2 * len(operations)), layout="constrained")
        for op, (left, right) in zip(operations, figure.subplots(len(operations), 2, squeeze=False), strict=True):
            chosen = [row for row in rows if row.op == op]
            _panel(left, chosen, "time_us_p50", f"{op}: median time, µs (lower is better)")
            _panel(right, chosen, "busbw_gbps", "bus bandwidth, GB/s (higher is better)")
            left.legend(frameon=False, fontsize=8, loc="upper left")
        where = f"{rows[0].ranks} ranks on one host ({host['cpu']}, {host['cores']} cores)"
        figure.suptitle(f"{rows[0].bench}, {rows[0].dtype}, {where}")
        figure.savefig(path, dpi=150)


def _panel(axes: Axes, rows: Sequence[Row], field: str, label: str) -> None:
    measured = {row.backend for row in rows}
    for spec in [*CONTENDERS.values(), BOUND]:
        if spec.name not in measured:
            continue
        points = [(row.bytes, getattr(row, field)) for row in rows if row.backend == spec.name]
        colour, marker = _STYLES.get(spec.name, ("black", ""))
        style = "--" if spec is BOUND else "-"
        axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, label=spec.label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=16))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_label(int(size))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.set_xlabel("message")
    axes.set_ylabel(label)
    axes.grid(True, which="major", alpha=0.3)
