"""The ``pycomm`` command: ``pycomm pretrain``, ``pycomm schedule`` and ``pycomm doctor``."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from pycomm_command import StopSignals

USAGE = """\
usage: pycomm [--version] [--help] COMMAND ...

Communication and parallelism for pretraining large language models.

commands:
  pretrain   pretrain a small GPT on text, with several processes (pycomm pretrain --help)
  schedule   draw, check and predict a pipeline schedule (pycomm schedule --help)
  doctor     what this machine has, what works, and what `auto` chooses (pycomm doctor --help)
"""

EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None, signals: StopSignals | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: arguments without the program's name; default: those of this process.
        signals: what listens to SIGINT and SIGTERM in this process; None: Python's own handlers do.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    signals = signals or StopSignals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal's encoding has not
    try:
        return _dispatch(args, signals)
    except KeyboardInterrupt:
        return signals.exit_code()


def _dispatch(args: list[str], signals: StopSignals) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else EXIT_USAGE
    if args[0] == "--version":
        from pycomm import __version__

        print(f"pycomm {__version__}")
        return 0
    command = COMMANDS.get(args[0])
    if command is None:
        print(f"pycomm: there is no command {args[0]!r}; one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    return command(args[1:], signals)


def _pretrain(args: list[str], signals: StopSignals) -> int:
    # Imports wait until they are needed, so that `pycomm --help` does not load torch.
    import tyro

    from pycomm import env
    from pycomm.pretrain.config import PRESETS, PretrainConfig

    config = tyro.cli(
        PretrainConfig, args=args, default=PRESETS["tiny"], prog="pycomm pretrain", description=PRETRAIN_HELP
    )
    command = shlex.join(["pycomm", "pretrain", *_without_resume(args)])
    try:
        launched = env.launch()
        if launched is None:
            config.validate(config.nproc)
            config.check_files()
    except ValueError as error:  # of a ConfigError too
        print(f"pycomm pretrain: {error}", file=sys.stderr)
        return EXIT_USAGE
    if launched is None and config.nproc > 1:
        from pycomm.pretrain.launch import launch, worker_code

        return launch(config.nproc, worker_code(), ["pretrain", *args], signals)
    from pycomm.pretrain import worker

    return worker.main(config, command, signals)


def _doctor(args: list[str], signals: StopSignals) -> int:
    from pycomm import doctor

    signals.interrupt()  # it has processes and a folder to clear away

    return doctor.main(args)


def _schedule(args: list[str], signals: StopSignals) -> int:
    from pycomm.pipeline import command

    return command.main(args)


def _without_resume(args: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip_value = False
    for arg in args:
        if skip_value:
            skip_value = False
        elif arg == "--resume":
            skip_value = True
        elif not arg.startswith("--resume="):
            kept.append(arg)
    return kept


PRETRAIN_HELP = """\
Pretrain a small GPT on text that every machine has, with several processes that share the batch. Starts its own
workers; inside torchrun it uses those. Ctrl-C ends all workers after the current step and keeps a checkpoint."""

COMMANDS: Mapping[str, Callable[[list[str], StopSignals], int]] = MappingProxyType(
    {"pretrain": _pretrain, "schedule": _schedule, "doctor": _doctor}
)


if __name__ == "__main__":
    _signals = StopSignals()
    _signals.listen()
    sys.exit(main(signals=_signals))
