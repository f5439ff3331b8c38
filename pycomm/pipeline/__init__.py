"""Pipeline parallelism: the layers of a model divided over ranks, a batch cut into micro-batches that flow through.

Schedules are data: :func:`build` makes the known ones, :func:`verify` proves that one is sound, and
:func:`simulate` predicts its time.
"""

from pycomm.pipeline.actions import Action, Schedule
from pycomm.pipeline.lowering import lower, place_weight_gradients
from pycomm.pipeline.schedules import NAMES, build
from pycomm.pipeline.simulate import Costs, Span, Timeline, simulate, transfer_s
from pycomm.pipeline.verify import slots_needed, verify

__all__ = [
    "NAMES",
    "Action",
    "Costs",
    "Schedule",
    "Span",
    "Timeline",
    "build",
    "lower",
    "place_weight_gradients",
    "simulate",
    "slots_needed",
    "transfer_s",
    "verify",
]
