"""Timelines as pictures: an SVG Gantt chart, and text for terminals.

Several timelines, such as planned and measured, are drawn one below the other on one time axis.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pycomm.pipeline.actions import COMPUTE
from pycomm.pipeline.simulate import Span, Timeline

__all__ = ["svg", "text"]

COLOURS = {"F": "#4c8bf5", "B": "#2fa36b", "W": "#f0b429", "BW": "#2fa36b"}
_WIDTH, _ROW, _GAP, _LEFT, _TITLE, _LEGEND = 1000, 26, 6, 64, 22, 34  # pixels
_LETTER = 6.5  # pixels that a digit takes


def svg(timelines: Mapping[str, Timeline], path: str | os.PathLike[str]) -> None:
    """Write a Gantt chart of the computations, one row a rank, micro-batches as numbers.

    Args:
        timelines: title -> timeline; seconds from each one's first start.
    """
    longest = max((timeline.makespan for timeline in timelines.values()), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - _GAP) / longest
    parts: list[str] = []
    top = _GAP
    for title, timeline in timelines.items():
        heading = f"{title}: " if title else ""
        parts.append(
            _label(_LEFT, top + 14, f"{heading}{timeline.makespan:.4g} s, bubble {timeline.bubble_fraction:.1%}")
        )
        top += _TITLE
        origin = min((span.start for spans in timeline.ranks for span in spans), default=0.0)
        for rank, spans in enumerate(timeline.ranks):
            parts.append(_label(_GAP, top + 17, f"rank {rank}"))
            parts.append(
                f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH - _LEFT - _GAP}" height="{_ROW}" fill="#eeeeee"/>'
            )
            parts += [
                _bar(span, _LEFT + (span.start - origin) * scale, top, (span.end - span.start) * scale)
                for span in spans
                if span.action.kind in COMPUTE
            ]
            top += _ROW + 2
        top += _GAP
    parts.append(_legend(top))
    height = top + _LEGEND
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>\n'
    )
    Path(path).write_text(head + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")


def text(timeline: Timeline, width: int = 100) -> str:
    """One line a rank: F, B and W where they run (a BW is B), dots where the rank waits.

    Args:
        width: characters for the makespan. If every action is a whole number of seconds and they fit, one is a second.
    """
    makespan = timeline.makespan or 1.0
    times = [time for spans in timeline.ranks for span in spans for time in (span.start, span.end)]
    origin = min(times, default=0.0)
    whole = makespan <= width and all((time - origin).is_integer() for time in times)
    columns = round(makespan) if whole else width
    lines = []
    for rank, spans in enumerate(timeline.ranks):
        row = ["."] * columns
        for span in spans:
            if span.action.kind in COMPUTE:
                first = round((span.start - origin) / makespan * columns)
                last = max(first + 1, round((span.end - origin) / makespan * columns))
                mark = span.action.kind[0]
                row[first:last] = [mark] * (min(last, columns) - first)
        lines.append(f"rank {rank:<2} |{''.join(row)}|")
    return "\n".join(lines)


def _bar(span: Span, x: float, y: float, width: float) -> str:
    action = span.action
    shade = 1.0 if action.stage % 2 == 0 else 0.7  # tells the two chunks of a rank apart in a V
    number = str(action.microbatch)
    inside = ""
    if width > _LETTER * len(number):
        inside = f'<text x="{x + width / 2:.2f}" y="{y + 17}" text-anchor="middle">{number}</text>'
    return (
        f'<g><title>{action}: {span.start:.6g} to {span.end:.6g} s</title><rect x="{x:.2f}" y="{y}" '
        f'width="{max(width - 0.5, 0.5):.2f}" height="{_ROW}" fill="{COLOURS[action.kind]}" fill-opacity="{shade}"/>'
        f"{inside}</g>"
    )


def _label(x: float, y: float, words: str) -> str:
    safe = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}">{safe}</text>'


def _legend(top: int) -> str:
    words = (("F", "F forward"), ("B", "B backward (inputs, or all)"), ("W", "W weight gradients"))
    parts = []
    for n, (kind, meaning) in enumerate(words):
        x = _LEFT + 200 * n
        parts.append(f'<rect x="{x}" y="{top}" width="12" height="12" fill="{COLOURS[kind]}"/>')
        parts.append(_label(x + 18, top + 11, meaning))
    return "\n".join(parts)
