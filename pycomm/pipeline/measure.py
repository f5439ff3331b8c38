"""Measured timelines and costs, for the simulator and for an even split."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from pycomm.communicator import Communicator
from pycomm.pipeline.actions import KINDS, Action
from pycomm.pipeline.simulate import Costs, Span, Timeline

__all__ = ["gather_spans", "measured_costs"]


def gather_spans(comm: Communicator, spans: Sequence[Span]) -> list[list[Span]]:
    """Every rank's spans, by rank. Collective; only times of one host are on one clock."""
    counts = [count for (count,) in comm.agree([len(spans)])]
    rows = [[KINDS.index(s.action.kind), s.action.stage, s.action.microbatch, s.start, s.end] for s in spans]
    mine = torch.tensor(rows, dtype=torch.float64, device=comm.device).view(-1, 5)
    table = torch.empty(sum(counts), 5, dtype=torch.float64, device=comm.device)
    comm.all_gather(table, mine, output_splits=counts)
    return [
        [Span(Action(KINDS[int(kind)], int(stage), int(i)), start, end) for kind, stage, i, start, end in part.tolist()]
        for part in table.split(counts)
    ]


def measured_costs(timelines: Sequence[Timeline], num_stages: int, comm: float | Sequence[float] = 0.0) -> Costs:
    """The mean seconds of each stage's F, B and W over micro-batches, in the timelines of middling length.

    The mean, since what follows one after the other takes the sum; of the middle half of the timelines, as sorted by
    makespan, since a pause of the whole machine is no cost of a stage.

    Where backward is in one piece (BW), half of it counts as B and half as W; their sum is what matters there.

    Args:
        timelines: measured ones.
        num_stages: of the model.
        comm: of a transfer, as :class:`Costs` takes it; spans do not show it.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    by_length = sorted(timelines, key=lambda timeline: timeline.makespan)
    aside = len(by_length) // 4
    for timeline in by_length[aside : len(by_length) - aside]:
        for spans in timeline.ranks:
            for span in spans:
                seconds.setdefault((span.action.kind, span.action.stage), []).append(span.end - span.start)
    typical = {place: fmean(values) for place, values in seconds.items()}
    stages = range(num_stages)
    whole = [typical.get(("BW", stage), 0.0) / 2 for stage in stages]
    return Costs(
        f=[typical[("F", stage)] for stage in stages],
        b=[typical.get(("B", stage), whole[stage]) for stage in stages],
        w=[typical.get(("W", stage), whole[stage]) for stage in stages],
        comm=comm,
    )
