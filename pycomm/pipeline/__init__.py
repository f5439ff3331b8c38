"""Pipeline parallelism: the layers of a model divided over ranks, a batch cut into micro-batches that flow through.

Schedules are data: :func:`build` makes the known ones, :func:`verify` proves that one is sound, :func:`simulate`
predicts its time, and :class:`Pipeline` runs it over :class:`PipelineStage`.
"""

from pycomm.pipeline.actions import Action, Schedule
from pycomm.pipeline.lowering import lower, place_weight_gradients
from pycomm.pipeline.partition import measure_layers, measure_memory, parameter_costs, partition
from pycomm.pipeline.runtime import Pipeline
from pycomm.pipeline.schedules import NAMES, build
from pycomm.pipeline.simulate import Costs, Span, Timeline, measured_costs, simulate, transfer_s
from pycomm.pipeline.stage import PipelineStage
from pycomm.pipeline.verify import slots_needed, verify

__all__ = [
    "NAMES",
    "Action",
    "Costs",
    "Pipeline",
    "PipelineStage",
    "Schedule",
    "Span",
    "Timeline",
    "build",
    "lower",
    "measure_layers",
    "measure_memory",
    "measured_costs",
    "parameter_costs",
    "partition",
    "place_weight_gradients",
    "simulate",
    "slots_needed",
    "transfer_s",
    "verify",
]
