"""Which layers make which stage, by their costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn

__all__ = ["measure_layers", "measure_memory", "parameter_costs", "partition"]


def partition(costs: Sequence[float], num_stages: int) -> list[range]:
    """Cut layers into ``num_stages`` runs so that the largest sum of costs is as small as can be.

    Args:
        costs: one of each layer, in any unit, not negative.
        num_stages: every stage gets at least one layer.

    Returns:
        The layers of each stage.

    Raises:
        ValueError: more stages than layers, or a negative cost.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layer(s) cannot make {num_stages} stage(s): every stage has at least one")
    if min(costs) < 0:
        raise ValueError(f"costs are not negative, got {list(costs)}")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[n]: (largest stage, where the last stage begins) of the first n layers in as many stages as rounds so far.
    best = {n: (total[n], 0) for n in range(1, num_layers + 1)}
    begins: list[dict[int, int]] = []
    for stages in range(2, num_stages + 1):
        best = {
            n: min((max(best[cut][0], total[n] - total[cut]), cut) for cut in range(stages - 1, n))
            for n in range(stages, num_layers + 1)
        }
        begins.append({n: cut for n, (_, cut) in best.items()})
    cuts = [num_layers]
    for begin in reversed(begins):
        cuts.append(begin[cuts[-1]])
    cuts.append(0)
    return [range(end, start) for start, end in pairwise(cuts)][::-1]


def parameter_costs(layers: Sequence[nn.Module]) -> list[float]:
    """An estimate: the work of a layer grows with its parameters. Embeddings look dearer than they are."""
    return [float(sum(param.numel() for param in layer.parameters())) for layer in layers]


def measure_layers(
    layers: Sequence[nn.Module],
    sample: Tensor,
    *,
    loss_of: Callable[[Tensor], Tensor] | None = None,
    repeats: int = 5,
) -> list[float]:
    """Seconds of forward and backward of each layer, the median of ``repeats``, one after the other on ``sample``.

    Args:
        layers: each takes what the one before returned.
        sample: a micro-batch, the input of the first.
        loss_of: put on top of the last layer and counted with it.
        repeats: measured runs, after one that is not counted.
    """
    seconds: list[list[float]] = [[] for _ in layers]
    for repeat in range(repeats + 1):
        x = sample
        for index, layer in enumerate(layers):
            x = x.detach()
            if x.is_floating_point() and index > 0:
                x.requires_grad_()
            start = time.perf_counter()
            output = layer(x)
            if loss_of is not None and index == len(layers) - 1:
                output = loss_of(output)
            if output.requires_grad:
                params = [param for param in layer.parameters() if param.requires_grad]
                wanted = [*params, *([x] if x.requires_grad else [])]
                torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
            if repeat:
                seconds[index].append(time.perf_counter() - start)
            x = output
    return [median(times) for times in seconds]


def measure_memory(
    layers: Sequence[nn.Module], sample: Tensor, *, loss_of: Callable[[Tensor], Tensor] | None = None
) -> list[int]:
    """Bytes that autograd keeps of one micro-batch for each layer's backward, parameters and buffers excepted.

    Memory that several layers keep counts for the first of them. A stage's is the sum over its layers, for
    ``build("zb_h1", ..., stage_memory=...)``.

    Args:
        layers: each takes what the one before returned.
        sample: a micro-batch, the input of the first.
        loss_of: put on top of the last layer and counted with it.
    """
    owned = {_where(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    kept: list[dict[int, int]] = [{} for _ in layers]
    seen: dict[int, Tensor] = {}  # the tensors too, so that no address is used twice
    x = sample
    for index, layer in enumerate(layers):

        def pack(tensor: Tensor, mine: dict[int, int] = kept[index]) -> Tensor:
            where = _where(tensor)
            if where not in owned and where not in seen:
                seen[where] = tensor
                mine[where] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = layer(x)
            if loss_of is not None and index == len(layers) - 1:
                x = loss_of(x)
    return [sum(sizes.values()) for sizes in kept]


def _where(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
