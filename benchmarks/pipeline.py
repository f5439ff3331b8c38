"""One training step of a pipelined GPT: pycomm's schedules beside torch.distributed.pipelining on gloo, in turn.

``python benchmarks/pipeline.py --svg docs/img/pipeline.svg --json out.jsonl``

Every row has the measured step, the step that the simulator predicts from the costs measured in the same steps, and the
bubble of both. benchmarks/README.md derives the columns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

from host import describe_host, load_warning
from linux import die_with_parent
from pipeline_contenders import CONTENDERS, Settings, run_rank


def main() -> int:
    """Parse the command line, run the ranks, print the table."""
    settings, json_path, svg_path = _parse()
    warning = load_warning()
    if warning:
        print(warning, file=sys.stderr)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_start, args=(rank, settings, f"{folder}/store", svg_path, sender))
            for rank in range(settings.ranks)
        ]
        for process in ranks:
            process.start()
        sender.close()
        try:
            rows = receiver.recv()
        except EOFError:
            rows = None
        for process in ranks:
            process.join()
    if rows is None or any(process.exitcode for process in ranks):
        print("a rank failed; its traceback is above", file=sys.stderr)
        return 1
    _report(rows, settings, json_path)
    return 0


def _start(rank: int, settings: Settings, store: str, svg_path: Path | None, sender: object) -> None:
    die_with_parent()
    rows = run_rank(rank, settings, store, svg_path)
    if rank == 0:
        sender.send(rows)  # type: ignore[attr-defined]


def _report(rows: list[dict[str, object]], settings: Settings, json_path: Path | None) -> None:
    print(f"{settings.ranks} ranks, {settings.microbatches} micro-batches, {settings.describe()}")
    print(
        f"{'contender':<24}{'step ms':>9}{'p25':>8}{'p75':>8}{'x torch-1f1b':>14}{'simulated':>11}{'off':>8}"
        f"{'bubble':>9}{'simul.':>8}{'slowest stage':>15}{'peak MiB':>10}"
    )
    steps = {str(row["contender"]): row["steps_ms"] for row in rows}
    base = median(steps["torch-1f1b"]) if "torch-1f1b" in steps else None  # type: ignore[type-var,arg-type]
    for row in rows:
        values = row.pop("steps_ms")
        p25, p50, p75 = quantiles(values, n=4)  # type: ignore[type-var,arg-type]
        row |= {"step_ms_p25": p25, "step_ms_p50": p50, "step_ms_p75": p75, "ratio": base and base / p50}
        simulated = row.get("simulated_ms")
        row["simulated_off"] = None if simulated is None else p50 / simulated - 1  # type: ignore[operator]
        cells = [
            f"{row['contender']:<24}{p50:>9.1f}{p25:>8.1f}{p75:>8.1f}{_cell(row['ratio'], '14.2f')}",
            f"{_cell(simulated, '11.1f')}{_cell(row['simulated_off'], '8.1%')}{_cell(row.get('bubble'), '9.1%')}",
            f"{_cell(row.get('simulated_bubble'), '8.1%')}{_cell(row.get('busiest_ms'), '15.1f')}",
            f"{_cell(row.get('peak_mib'), '10.1f')}",
        ]
        print("".join(cells))
    if json_path is not None:
        head = {"host": describe_host(), "settings": vars(settings)}
        lines = [{"bench": "pipeline", **row, **(head if index == 0 else {})} for index, row in enumerate(rows)]
        json_path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _cell(value: object, form: str) -> str:
    width = int(form.partition(".")[0])
    return f"{'-':>{width}}" if value is None else format(value, form)


def _parse() -> tuple[Settings, Path | None, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    for name in ("ranks", "microbatches", "micro_batch", "layers", "hidden", "heads", "vocab", "seq", "steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name), metavar="N")
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help=f"any of {', '.join(CONTENDERS)}; all by default"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON lines, one a contender")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="measured and simulated timelines of 1f1b and zb_h1")
    parsed = vars(parser.parse_args())
    json_path, svg_path, names = parsed.pop("json"), parsed.pop("svg"), parsed.pop("contenders").split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        parser.error(f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    return Settings(**parsed, contenders=tuple(names)), json_path, svg_path


if __name__ == "__main__":
    sys.exit(main())
