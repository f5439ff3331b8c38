"""``pycomm doctor``: what this machine has, what works, which back end ``auto`` chooses, what to do about the rest."""

import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pycomm import _C, env
from pycomm.backends import choose
from pycomm.backends.nccl import offer
from pycomm.doctor import gpu, host
from pycomm.doctor.checks import Check, Report, Section
from pycomm.doctor.self_test import self_test
from pycomm.errors import BackendUnavailableError
from pycomm.records import host_identity

__all__ = ["Check", "Options", "Report", "Section", "main", "report"]

MOST_TIMEOUT_S = 86_400.0
SYMBOLS = {"ok": "[green]✓[/]", "absent": "[dim]-[/]", "warning": "[yellow]![/]", "failed": "[red]✗[/]"}


@dataclass(frozen=True)
class Options:
    """Look at this machine and say what pycomm can do on it."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of tables."""
    timeout_s: float = 60.0
    """Seconds after which the two-rank self-test counts as failed; 0 leaves it out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Returns 0 when pycomm works here, 1 when something it needs does not."""
    argv = sys.argv[1:] if argv is None else argv
    if "--tune" in argv:
        print(
            "pycomm doctor --tune has moved: run python benchmarks/tune.py in a checkout of pycomm (docs/tuning.md)",
            file=sys.stderr,
        )
        return 2
    options = tyro.cli(Options, prog="pycomm doctor", args=argv)
    if not 0 <= options.timeout_s <= MOST_TIMEOUT_S:
        print(
            f"pycomm doctor: --timeout-s must be from 0 to {MOST_TIMEOUT_S:g} seconds, got {options.timeout_s}",
            file=sys.stderr,
        )
        return 2
    found = report(options.timeout_s)
    if options.json:
        print(json.dumps({"healthy": found.healthy, **dataclasses.asdict(found)}, indent=2))
    else:
        show(found, Console())
    return 0 if found.healthy else 1


def report(timeout_s: float = 60.0) -> Report:
    """Look at everything; takes some seconds, most of them the two ranks' start.

    Args:
        timeout_s: the self-test's limit in seconds; 0 leaves the self-test out.
    """
    sections = [
        Section("Versions", versions()),
        Section("Machine", host.machine()),
        Section("Limits", host.limits()),
        Section("GPU", gpu.gpu()),
        Section("Back end", [auto_backend(), several_hosts()]),
    ]
    if timeout_s > 0:
        sections.append(Section("Self-test", self_test(timeout_s)))
    return Report(sections)


def versions() -> list[Check]:
    return [
        extension(importlib.metadata.version("pycomm"), _C.version(), _C.build_id()),
        Check("torch", "ok", torch.__version__),
        Check("numpy", "ok", numpy.__version__),
        Check("Python", "ok", platform.python_version()),
    ]


def auto_backend() -> Check:
    """What ``pycomm.init("auto")`` takes on this host: for as many ranks as there are GPUs to use, or for two."""
    mine = offer(asked_for=False)
    num_ranks = torch.cuda.device_count() if mine.gpu else 2
    gpus = [f"GPU {index}" for index in range(num_ranks)] if mine.gpu else []
    try:
        choice = choose("auto", [host_identity()] * num_ranks, [mine.obstacle] * num_ranks, gpus)
    except BackendUnavailableError as error:
        return Check("auto", "failed", str(error))
    more = f"; more than {num_ranks} rank(s) share this host's memory (shm)" if choice.name == "nccl" else ""
    return Check("auto", "ok", f"{choice.name}: {choice.reason}{more}")


def several_hosts() -> Check:
    """What ``pycomm.init("host")`` takes for ranks on two hosts; so does "auto" where they have no GPUs."""
    if not torch.distributed.is_gloo_available():
        return Check("several hosts", "absent", "this torch is built without gloo, which connects hosts")
    interface = env.gloo_interface()
    where = "the address that reaches MASTER_ADDR" if interface is None else f"{interface} (GLOO_SOCKET_IFNAME)"
    return Check("several hosts", "ok", f"{choose('host', ['a', 'b']).name}: shared memory inside, gloo at {where}")


def extension(package: str, compiled: str, build_id: int) -> Check:
    """The Python files and the extension must come from the same version: a checkout can outrun its last build."""
    if package != compiled:
        advice = "install again: pip install -c constraints.txt -e '.[test]'"
        return Check("pycomm", "failed", f"{package}, but its extension was built from {compiled}", advice)
    return Check("pycomm", "ok", f"{package}, build {build_id:x}")


def show(found: Report, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section in found.sections:
        table.add_row("", f"[bold]{section.title}[/]", "")
        for check in section.checks:
            advice = f"\n[yellow]→ {escape(check.advice)}[/]" if check.advice else ""
            table.add_row(SYMBOLS[check.status], check.name, escape(check.detail) + advice)
    console.print(table)
    console.print(
        "[green]pycomm works here.[/]" if found.healthy else "[red]pycomm does not work here: see ✗ above.[/]"
    )
