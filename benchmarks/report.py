"""What a run shows: rows as they come, notes on what could not be measured, a closing table, JSON lines, a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from contenders import BOUND, CONTENDERS
from operations import DTYPES
from rich.console import Console
from rich.table import Table

_COLUMNS = (
    f"{'size':>11} {'count':>11} {'dtype':>9}  {'backend':<16} {'p50 us':>11} {'p99 us':>11} "
    f"{'algbw':>8} {'busbw':>8} {'#wrong':>7} {'bound':>7} {'x pycomm':>9}"
)


@dataclass(frozen=True)
class Row:
    """One line of the results; times in microseconds, bandwidths in GB/s, sizes in bytes.

    Args:
        bound_share: median of the bound over this median; None where the bound could not be measured.
        ratio_to_pycomm: this median over that of pycomm on symmetric memory; above 1, pycomm is faster.
        iterations: how many timed iterations the quantiles come from.
    """

    bench: str
    backend: str
    op: str
    ranks: int
    dtype: str
    bytes: int
    time_us_p50: float
    time_us_p99: float
    algbw_gbps: float
    busbw_gbps: float
    wrong: int
    bound_share: float | None
    ratio_to_pycomm: float | None
    iterations: int


def size_label(num_bytes: int) -> str:
    """``1 KB`` for 1,024, ``256 MB`` for 2**28; plain bytes where no unit fits."""
    for unit, label in ((2**30, "GB"), (2**20, "MB"), (2**10, "KB")):
        if num_bytes > 0 and num_bytes % unit == 0:
            return f"{num_bytes // unit} {label}"
    return f"{num_bytes} B"


def format_row(row: Row) -> str:
    """One aligned line under the column heads."""
    share = f"{row.bound_share:.1%}" if row.bound_share is not None else "n/a"
    ratio = f"{row.ratio_to_pycomm:.2f}" if row.ratio_to_pycomm is not None else "n/a"
    return (
        f"{row.bytes:>11} {row.bytes // DTYPES[row.dtype]:>11} {row.dtype:>9}  {row.backend:<16} "
        f"{row.time_us_p50:>11.2f} {row.time_us_p99:>11.2f} {row.algbw_gbps:>8.3f} {row.busbw_gbps:>8.3f} "
        f"{row.wrong:>7} {share:>7} {ratio:>9}"
    )


class Report:
    """Everything that leaves the driver.

    Args:
        json_path: rows go here as JSON lines while the run lasts; the first also carries ``host``.
        plot_path: the picture, written at the end.
    """

    def __init__(
        self, bench: str, operations: Sequence[str], ranks: int, json_path: Path | None, plot_path: Path | None
    ) -> None:
        self._bench, self._operations, self._ranks, self._plot_path = bench, operations, ranks, plot_path
        self._json: TextIO | None = json_path.open("w") if json_path is not None else None
        self._host: dict[str, object] = {}
        self._all: list[Row] = []
        self._notes: list[str] = []
        self._unavailable: dict[tuple[str, str], str] = {}  # (operation, backend) -> reason

    def note(self, text: str) -> None:
        """Say it now and again at the end: a contender that is missing, or that failed."""
        self.say(text)
        self._notes.append(text)

    def say(self, text: str) -> None:
        self._clear_progress()
        print(text, flush=True)

    def not_available(self, operation: str, backend: str, reason: str) -> None:
        """A contender that cannot do this operation, dtype or size: its cell is n/a, with a footnote once."""
        self._unavailable.setdefault((operation, backend), reason)

    def progress(self, text: str) -> None:
        """What is going on, on one line that is overwritten; only on a terminal."""
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    def header(self, host: dict[str, object], versions: dict[str, str], warning: str | None) -> None:
        """The machine, the versions of all contenders, and the column heads."""
        self._host = {**host, "ranks": self._ranks, "versions": versions, "notes": list(self._notes)}
        self._clear_progress()
        print("# " + ", ".join(f"{key} {value}" for key, value in host.items()))
        for name, version in versions.items():
            print(f"# {name:<16} {version}")
        if warning is not None:
            self.note(warning)
        print(f"# {self._bench}, {self._ranks} ranks; algbw and busbw in GB/s; README.md derives the columns")
        print(_COLUMNS, flush=True)

    def rows(self, rows: Iterable[Row]) -> None:
        """Print rows and append them to the JSON file."""
        self._clear_progress()
        for row in rows:
            if len(self._operations) > 1 and (not self._all or self._all[-1].op != row.op):
                print(f"# {row.op}")
            print(format_row(row), flush=True)
            if self._json is not None:
                extra = {} if self._all else {"host": self._host}
                print(json.dumps({**asdict(row), **extra}), file=self._json, flush=True)
            self._all.append(row)

    def finish(self) -> None:
        """The closing table, the notes, the picture."""
        if self._json is not None:
            self._json.close()
        for op in dict.fromkeys(row.op for row in self._all):
            print(f"\n{op}: median in us, and how many times that of pycomm on symmetric memory")
            Console(width=None if sys.stdout.isatty() else 140).print(
                self._table(op, [row for row in self._all if row.op == op])
            )
        for backend, reason in dict.fromkeys((key[1], reason) for key, reason in self._unavailable.items()):
            print(f"n/a: {backend}: {reason}")
        for text in self._notes:
            print(text)
        if self._plot_path is not None and self._all:
            from plot import draw  # matplotlib takes a second to load; only who asks for a picture waits

            draw(self._all, self._host, self._plot_path)
            print(f"picture: {self._plot_path}")

    def _table(self, op: str, rows: list[Row]) -> Table:
        table = Table()
        table.add_column("size", justify="right")
        measured = {row.backend for row in rows} | {name for operation, name in self._unavailable if operation == op}
        names = [name for name in (*CONTENDERS, BOUND.name) if name in measured]
        for name in names:
            table.add_column(name, justify="right")
        cells = {(row.bytes, row.backend): row for row in rows}
        for num_bytes in sorted({row.bytes for row in rows}):
            line = [size_label(num_bytes)]
            for name in names:
                row = cells.get((num_bytes, name))
                ratio = f" ({row.ratio_to_pycomm:.2f})" if row and row.ratio_to_pycomm is not None else ""
                line.append(f"{row.time_us_p50:,.1f}{ratio}" if row else "n/a")
            table.add_row(*line)
        return table

    def _clear_progress(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
