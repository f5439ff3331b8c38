"""Backward in two halves: gradients of the input now (B), gradients of the weights later (W).

Works on the graph that autograd has recorded, for any module. A *joint* is a node from which a branch leads to nothing
but one parameter: the product of a linear layer, the scaling of a norm. B lets the gradient flow through the graph to
the input and catches what enters each joint; autograd computes there only what flows on. W later sends what was caught
into each joint's branch to its parameter. Nothing is computed twice and the bits are those of one backward.

A parameter that several joints lead to (tied weights in one stage), or a joint with several outputs, is not split: its
gradient is computed in B.

Ref: "Zero Bubble Pipeline Parallelism" (2023), section 2.1; the graph is cut as torch.distributed.pipelining does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["SplitBackward"]


class SplitBackward:
    """The two halves of one micro-batch's backward from ``output``.

    Args:
        output: what the stage returned, or its loss.
        params: those whose gradients are wanted.
    """

    def __init__(self, output: Tensor, params: Iterable[nn.Parameter]) -> None:
        self._output = output
        root = get_gradient_edge(output)
        leaves = {get_gradient_edge(param).node: param for param in params if param.requires_grad}
        branches = list(_branches(root, leaves))
        uses = Counter(id(param) for joint, param in branches if joint is not None)
        unsplit = {id(param) for joint, param in branches if joint is None or uses[id(param)] > 1}
        self._at_once = list({id(param): param for _, param in branches if id(param) in unsplit}.values())
        self._joints: dict[Node, list[nn.Parameter]] = {}
        for joint, param in branches:
            if joint is not None and id(param) not in unsplit:
                self._joints.setdefault(joint, []).append(param)
        self._caught: list[Tensor | None] = []

    def inputs(self, grad: Tensor | None, stage_input: Tensor | None) -> Tensor | None:
        """B: the gradient of ``stage_input`` (None: none is wanted), given that of the output (None: a scalar's, 1)."""
        edges = [GradientEdge(joint, 0) for joint in self._joints]
        wanted: list[Tensor | GradientEdge] = [*edges, *self._at_once]
        if stage_input is not None:
            wanted.append(stage_input)
        if not wanted:
            return None
        # Retained, since W needs what the joints have saved.
        found = torch.autograd.grad(
            [self._output],
            wanted,  # type: ignore[arg-type]  # torch takes both kinds in one list
            None if grad is None else [grad],
            retain_graph=True,
            allow_unused=True,
        )
        self._caught = list(found[: len(edges)])
        for param, part in zip(self._at_once, found[len(edges) :], strict=False):
            _accumulate(param, part)
        return found[-1] if stage_input is not None else None

    def weights(self) -> None:
        """W: accumulate into ``.grad`` what B left over. Once."""
        for (joint, params), grad in zip(self._joints.items(), self._caught, strict=True):
            if grad is not None:
                torch.autograd.backward([GradientEdge(joint, 0)], [grad], inputs=params)
        self._joints.clear()
        self._caught.clear()


def _branches(root: GradientEdge, leaves: dict[Node, nn.Parameter]) -> Iterator[tuple[Node | None, nn.Parameter]]:
    """Every way to a parameter as (joint, parameter); joint None: it cannot be split off."""
    ends: dict[Node, nn.Parameter | None] = {}
    if _end_of_chain(root.node, leaves, ends) is not None:
        yield None, _require(_end_of_chain(root.node, leaves, ends))
        return
    seen = {root.node}
    todo = [root.node]
    several_outputs = {root.node} if root.output_nr else set()
    found: list[tuple[Node, nn.Parameter]] = []
    while todo:
        node = todo.pop()
        for following, output_nr in node.next_functions:
            if following is None:
                continue
            param = _end_of_chain(following, leaves, ends)
            if param is not None:
                found.append((node, param))
                continue
            if output_nr:
                several_outputs.add(following)
            if following not in seen:
                seen.add(following)
                todo.append(following)
    yield from ((None if node in several_outputs else node, param) for node, param in found)


def _end_of_chain(
    node: Node, leaves: dict[Node, nn.Parameter], known: dict[Node, nn.Parameter | None]
) -> nn.Parameter | None:
    """The parameter that is the only thing behind ``node``, if it is: a view or a cast of it, or a look-up in it."""
    chain = []
    end: nn.Parameter | None = None
    at: Node | None = node
    while at is not None:
        if at in known:
            end = known[at]
            break
        chain.append(at)
        if at in leaves:
            end = leaves[at]
            break
        following = [n for n, _ in at.next_functions if n is not None]
        at = following[0] if len(following) == 1 else None
    known.update(dict.fromkeys(chain, end))
    return end


def _require(param: nn.Parameter | None) -> nn.Parameter:
    assert param is not None
    return param


def _accumulate(param: nn.Parameter, grad: Tensor | None) -> None:
    if grad is None:
        return
    if param.grad is None:
        param.grad = grad.detach().clone()  # it may share memory with a buffer that is used again
    else:
        with torch.no_grad():
            param.grad += grad
