"""A picture of one step of a tensor-parallel block: what every rank computes, adds and waits for, on one clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from torch.profiler import ProfilerActivity, profile

COLOURS = {"product": "#4c8bf5", "other": "#a9c7f7", "sum": "#2fa36b", "wait": "#d9483b"}
_KINDS = {
    "aten::mm": "product", "aten::addmm": "product", "aten::bmm": "product", "aten::baddbmm": "product",
    "pycomm::sum": "sum", "pycomm::wait": "wait", "pycomm::gather": "other",
    "aten::gelu": "other", "aten::gelu_backward": "other", "aten::sum": "other", "aten::copy_": "other",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "other",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "other",
}  # fmt: skip
_WIDTH, _ROW, _GAP, _LEFT = 1000, 26, 6, 64  # pixels


class Span(NamedTuple):
    """Something a rank does; nanoseconds of the host's clock, the same for all its processes."""

    kind: str
    start: int
    end: int


def record(run: Callable[[], object]) -> list[Span]:
    """What ``run`` does on this rank, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    spans = [Span(_KINDS[event.name()], event.start_ns(), event.end_ns()) for event in events if event.name() in _KINDS]
    outer: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if not outer or span.start >= outer[-1].end:  # else a part of what is there: a product copies its bias first
            outer.append(span)
    return outer


def draw(steps: dict[str, Sequence[Sequence[Span]]], path: Path) -> None:
    """Write an SVG: for each title the ranks' spans, one row a rank, all on one scale."""
    begins = {title: min(span.start for rank in ranks for span in rank) for title, ranks in steps.items()}
    longest = max(span.end - begins[title] for title, ranks in steps.items() for rank in ranks for span in rank)
    scale = (_WIDTH - _LEFT - _GAP) / longest
    parts: list[str] = []
    top = _GAP
    for title, ranks in steps.items():
        length = max(span.end for rank in ranks for span in rank) - begins[title]
        parts.append(_text(_LEFT, top + 14, f"{title}: {length / 1e6:.2f} ms"))
        top += 22
        for rank, spans in enumerate(ranks):
            parts.append(_text(_GAP, top + 17, f"rank {rank}"))
            for span in spans:
                left = _LEFT + (span.start - begins[title]) * scale
                width = max(0.5, (span.end - span.start) * scale)
                parts.append(_box(left, top, width, COLOURS[span.kind]))
            top += _ROW + _GAP
    left = float(_LEFT)
    for kind, colour in COLOURS.items():
        parts += [_box(left, top, 14, colour, 14), _text(left + 20, top + 12, kind)]
        left += 100
    size = f'width="{_WIDTH}" height="{top + 24}"'
    style = 'font-family="sans-serif" font-size="12"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n")


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, colour: str, height: float = _ROW) -> str:
    return f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height}" fill="{colour}"/>'
