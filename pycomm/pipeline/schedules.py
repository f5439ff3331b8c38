"""The known schedules, each as its paper orders forwards and backwards. They emit computations alone.

What all have in common comes afterwards: :mod:`pycomm.pipeline.lowering` puts weight gradients into bubbles where
backward is split, and inserts the transfers. In the functions below p is the number of ranks and m of micro-batches.

A schedule of fewer micro-batches is a longer one with the last ones left out: what is left keeps its order, so it
cannot deadlock if the longer one does not. Where an order is regular only for large m, that is how others are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from pycomm.pipeline.actions import Action, Schedule
from pycomm.pipeline.lowering import lower, place_weight_gradients

__all__ = ["NAMES", "build"]

Order = list[list[Action]]


# What zb_h1 may exceed the largest memory of 1F1B by, where stages are of unequal size.
_MEMORY_TOLERANCE = 1.05


def build(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    chunks_per_rank: int = 1,
    *,
    stage_memory: Sequence[float] | None = None,
) -> Schedule:
    """A lowered schedule, transfers included.

    Args:
        name: "gpipe", "1f1b", "interleaved_1f1b", "zb_h1" or "zb_v".
        num_ranks: ranks of the pipeline.
        num_microbatches: parts of the batch; any number.
        chunks_per_rank: stages a rank. Any number for "interleaved_1f1b"; "zb_v" has two whatever is said here; the
            others have one.
        stage_memory: for "zb_h1": what each stage keeps of a micro-batch between forward and backward, in any unit
            (:func:`pycomm.pipeline.measure_memory`). A rank then holds as many micro-batches as fit into what 1F1B
            needs on the rank where it needs most, with 5 % to spare. Without it, stages count as equal.

    Raises:
        ValueError: an unknown name, or numbers that do not fit.
    """
    for what, value in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches)):
        if value < 1:
            raise ValueError(f"{what} is {value}: it must be at least 1")
    if name not in _BUILDERS:
        raise ValueError(f"there is no schedule {name!r}; one of {', '.join(_BUILDERS)}")
    allowed = {"interleaved_1f1b": chunks_per_rank >= 1, "zb_v": chunks_per_rank in (1, 2)}
    if not allowed.get(name, chunks_per_rank == 1):
        raise ValueError(f"{name} cannot have chunks_per_rank={chunks_per_rank}; interleaved_1f1b takes any number")
    if stage_memory is not None:
        if name != "zb_h1":
            raise ValueError(f"stage_memory is for zb_h1: {name} does not depend on it")
        return lower(_zb_h1(num_ranks, num_microbatches, 1, stage_memory))
    return lower(_BUILDERS[name](num_ranks, num_microbatches, chunks_per_rank))


def _gpipe(p: int, m: int, _chunks: int) -> Schedule:
    """All forwards, then all backwards. Ref: "GPipe: Efficient Training of Giant Neural Networks" (2019)."""
    order = [[Action(kind, rank, i) for kind in ("F", "BW") for i in range(m)] for rank in range(p)]
    return Schedule(order, list(range(p)), m, [m] * p)


def _one_f_one_b(p: int, m: int, _chunks: int) -> Schedule:
    """As few forwards ahead as keep the later ranks busy, then one backward for each forward.

    Ref: "PipeDream" (2019), "Memory-Efficient Pipeline-Parallel DNN Training" (2021), flushed every batch.
    """
    return Schedule(_one_f_one_b_order(p, m, "BW"), list(range(p)), m, _one_f_one_b_held(p, m))


def _one_f_one_b_order(p: int, m: int, backward: str) -> Order:
    return [
        _alternate([Action("F", r, i) for i in range(m)], [Action(backward, r, i) for i in range(m)], p - 1 - r)
        for r in range(p)
    ]


def _one_f_one_b_held(p: int, m: int) -> list[int]:
    return [min(m, p - rank) for rank in range(p)]


def _interleaved(p: int, m: int, v: int) -> Schedule:
    """v chunks a rank, stage c * p + r on rank r; micro-batches go in rounds of p, each through chunk after chunk.

    Where p does not divide m, the first rounds are larger by one or more.

    Ref: "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (2021), section 2.2.
    """
    if v == 1:
        return _one_f_one_b(p, m, 1)
    num_rounds = max(1, m // p)
    ends = [n * (m // num_rounds) + min(n, m % num_rounds) for n in range(num_rounds + 1)]
    rounds = [range(first, end) for first, end in pairwise(ends)]
    order = []
    bound = []
    for rank in range(p):
        forwards = [Action("F", c * p + rank, i) for r in rounds for c in range(v) for i in r]
        backwards = [Action("BW", c * p + rank, i) for r in rounds for c in reversed(range(v)) for i in r]
        warmup = 2 * (p - 1 - rank) + (v - 1) * len(rounds[0])
        order.append(_alternate(forwards, backwards, warmup))
        bound.append(min(v * m, warmup + 1))
    return Schedule(order, [stage % p for stage in range(v * p)], m, bound)


def _zb_h1(p: int, m: int, _chunks: int, stage_memory: Sequence[float] | None = None) -> Schedule:
    """1F1B's order with backward split; weight gradients wait for a bubble as long as 1F1B's memory allows.

    That is what 1F1B's first rank holds, p micro-batches, on all ranks where all stages are equal. Else no rank holds
    more than fits into the most that 1F1B needs on any.

    Ref: "Zero Bubble Pipeline Parallelism" (2023), section 2.3.
    """
    held = _one_f_one_b_held(p, m)
    memory = [1.0] * p if stage_memory is None else list(stage_memory)
    if len(memory) != p or min(memory) <= 0:
        raise ValueError(f"stage_memory is {memory}: a positive number for each of {p} stages")
    limit = _MEMORY_TOLERANCE * max(n * size for n, size in zip(held, memory, strict=True))
    bound = [max(n, min(m, p, int(limit / size))) for n, size in zip(held, memory, strict=True)]
    return place_weight_gradients(Schedule(_one_f_one_b_order(p, m, "B"), list(range(p)), m, bound))


def _zb_v(p: int, m: int, _chunks: int) -> Schedule:
    """Two chunks a rank in a V, so that the last rank turns forwards around and the first one begins backward at once.

    Rank r has stages r and 2p-1-r. Its memory is 2p of these half-sized stages, as 1F1B's p whole ones.

    Ref: "Zero Bubble Pipeline Parallelism" (2023), section 6.
    """
    length = max(m, 2 * p)
    order = []
    for rank in range(p):
        down, up = rank, 2 * p - 1 - rank  # the stages on the way down and up the V
        queues = {
            key: iter([Action(key[0], stage, i) for i in range(length)])
            for key, stage in (("F0", down), ("F1", up), ("B0", down), ("B1", up))
        }
        # Fill the V; turn around; then keep one forward and one backward of each chunk in flight until all is done.
        pattern = ["F0"] * (2 * (p - rank) - 1) + ["F1", "F0"] * rank + ["F1", "B1"] * (p - rank)
        pattern += ["F0", "B0", "F1", "B1"] * length
        actions = [next(queues[key], None) for key in pattern]
        actions += [next(queues["B0"], None) for _ in range(length)]
        order.append(_leave_out([action for action in actions if action is not None], m))
    return place_weight_gradients(
        Schedule(order, [*range(p), *reversed(range(p))], m, [min(2 * m, 2 * p)] * p),
    )


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """``warmup`` forwards, then a forward and a backward in turn, then what is left."""
    warmup = min(warmup, len(forwards))
    paired = len(forwards) - warmup
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards[:paired], strict=True):
        order += [forward, backward]
    return order + backwards[paired:]


def _leave_out(actions: list[Action], m: int) -> list[Action]:
    return [action for action in actions if action.microbatch < m]


_BUILDERS: Mapping[str, Callable[[int, int, int], Schedule]] = MappingProxyType(
    {
        "gpipe": _gpipe,
        "1f1b": _one_f_one_b,
        "interleaved_1f1b": _interleaved,
        "zb_h1": _zb_h1,
        "zb_v": _zb_v,
    }
)
NAMES = tuple(_BUILDERS)
