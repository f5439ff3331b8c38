"""The command line that all benchmark scripts share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contenders import CONTENDERS
from operations import DTYPES, OPERATIONS

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Options:
    """One run, as asked for on the command line.

    Args:
        operations: names of what is measured, one after the other.
        sizes: message sizes in bytes.
        turns: timed turns of each contender per size, interleaved A B C A B C …
        seconds: wall time that a turn aims at, untimed parts included; ``iterations``, when set, overrules it.
        timeout_s: what any one turn may take before its contender is given up.
    """

    ranks: int
    operations: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: str
    backends: tuple[str, ...]
    turns: int
    seconds: float
    iterations: int | None
    timeout_s: float
    json: Path | None = None
    plot: Path | None = None


def parse_size(text: str) -> int:
    """``"64"``, ``"64K"``, ``"64M"``, ``"1G"`` (powers of 1,024; an optional B or iB) in bytes."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in _UNITS and not number[-1:].isdigit() else ""
    digits = number.removesuffix(unit)
    if not digits.isdecimal() or int(digits) == 0:
        raise ValueError(f"{text!r} is not a size: write a whole number of bytes above 0, or one with K, M or G")
    return int(digits) * _UNITS[unit]


def parse_sizes(text: str) -> tuple[int, ...]:
    """``"1K:256M"`` (steps of 4), ``"1K:256M:2"`` (of 2), ``"1K,3000,2M"``, or one size; in bytes, ascending.

    The last size of a range is always measured, whether or not the steps meet it.
    """
    sizes: set[int] = set()
    for item in text.split(","):
        first, *rest = item.split(":")
        start = parse_size(first)
        stop = parse_size(rest[0]) if rest else start
        if len(rest) > 2 or stop < start or (len(rest) == 2 and not (rest[1].isdecimal() and int(rest[1]) >= 2)):
            raise ValueError(
                f"{item!r} is not a range of sizes: write FIRST:LAST or FIRST:LAST:FACTOR, FACTOR 2 or more"
            )
        factor = int(rest[1]) if len(rest) == 2 else 4
        steps = range(int(math.log(stop / start, factor)) + 2)
        sizes.update(start * factor**i for i in steps if start * factor**i < stop)
        sizes.add(stop)
    return tuple(sorted(sizes))


def parse_arguments(
    argv: Sequence[str] | None, description: str, operations: Sequence[str] = ("all_reduce",), sizes: str = "1K:256M"
) -> Options:
    """The command line that all benchmark scripts share.

    Args:
        operations: those of the script, of which ``--ops`` chooses.
        sizes: the default of ``--sizes``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes of each contender")
    parser.add_argument("--ops", default=",".join(operations), help="what to measure")
    parser.add_argument("--sizes", default=sizes, help="FIRST:LAST[:FACTOR] or a,b,c; bytes, or with K, M, G")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--backends", default=",".join(CONTENDERS), help="the contenders, separated by commas")
    parser.add_argument("--turns", type=int, default=5, help="turns of each contender per size")
    parser.add_argument("--seconds", type=float, default=0.2, help="wall time of a turn")
    parser.add_argument("--iters", type=int, default=None, help="iterations of a turn, instead of --seconds")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds after which a silent contender is given up"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write JSON lines, one row each")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="write a picture (.png, .svg, .pdf)")
    given = parser.parse_args(argv)
    backends = _names(parser, "--backends", given.backends, tuple(CONTENDERS))
    chosen = _names(parser, "--ops", given.ops, operations)
    for flag, number in (("ranks", given.ranks), ("turns", given.turns), ("iters", given.iters)):
        if number is not None and number < 1:
            parser.error(f"--{flag} must be at least 1")
    for name in chosen:
        if given.ranks < OPERATIONS[name].min_ranks:
            parser.error(f"--ranks: {name} takes at least {OPERATIONS[name].min_ranks}")
    try:
        num_bytes = parse_sizes(given.sizes)
    except ValueError as error:
        parser.error(f"--sizes: {error}")
    for flag, path in (("json", given.json), ("plot", given.plot)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{flag}: there is no directory {path.parent}")
    if given.plot is not None and given.plot.suffix not in _PICTURES:
        parser.error(f"--plot: {given.plot} must end in one of {', '.join(_PICTURES)}")
    if num_bytes[0] < DTYPES[given.dtype]:
        parser.error(f"--sizes: {num_bytes[0]} bytes hold no {given.dtype}")
    num_bytes = tuple(size // DTYPES[given.dtype] * DTYPES[given.dtype] for size in num_bytes)
    return Options(
        given.ranks, chosen, num_bytes, given.dtype, backends, given.turns, given.seconds, given.iters,
        given.timeout, given.json, given.plot,
    )  # fmt: skip


def _names(parser: argparse.ArgumentParser, flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """A list on the command line, each name once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        parser.error(f"{flag}: unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return names
