"""Backward in two halves: gradients of the input now (B), gradients of the weights later (W).

Works on the graph that autograd has recorded, for any module. A *joint* is a node from which a branch leads to nothing
but one parameter: the product of a linear layer, a convolution. B lets the gradient flow through the graph to the input
and catches what enters each joint; autograd computes there only what flows on. W later sends what was caught into each
joint's branch to its parameter. Nothing is computed twice.

The product of a linear layer is added to ``.grad`` by the matrix product itself, without a tensor in between; it then
rounds once less than autograd would. Vectors, such as the scales of norms, are not worth a second visit, and get their
gradients in B. So do a parameter that several joints lead to (tied weights in one stage), and what lies behind a node
with several outputs.

Ref: "Zero Bubble Pipeline Parallelism" (2023), section 2.1; the graph is cut as torch.distributed.pipelining does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["Leaves", "SplitBackward", "leaves_of"]

Leaves = Mapping[Node, nn.Parameter]


def leaves_of(params: Iterable[nn.Parameter]) -> Leaves:
    """Where autograd puts the gradients of those that need one; valid until ``requires_grad`` of one changes."""
    return {get_gradient_edge(param).node: param for param in params if param.requires_grad}


class SplitBackward:
    """The two halves of one micro-batch's backward from ``output``.

    Args:
        output: what the stage returned, or its loss.
        leaves: of the parameters whose gradients are wanted.
    """

    def __init__(self, output: Tensor, leaves: Leaves) -> None:
        self._output = output
        self._leaves = leaves
        branches = list(_branches(get_gradient_edge(output), leaves))
        uses = Counter(id(param) for joint, param in branches if joint is not None)
        unsplit = {id(p) for joint, p in branches if joint is None or uses[id(p)] > 1}
        vectors = {joint for joint, _ in branches} - {joint for joint, param in branches if param.ndim > 1}
        unsplit |= {id(param) for joint, param in branches if joint in vectors}
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
            if part is not None:
                # A copy: it may share memory with what came in, which is used again.
                _accumulate(param, part.clone() if param.grad is None else part)
        return found[-1] if stage_input is not None else None

    def weights(self) -> None:
        """W: accumulate into ``.grad`` what B left over. Once."""
        for (joint, params), grad in zip(self._joints.items(), self._caught, strict=True):
            if grad is not None and not _add_product(joint, params, grad, self._leaves):
                torch.autograd.backward([GradientEdge(joint, 0)], [grad], inputs=params)
        self._joints.clear()
        self._caught.clear()


def _add_product(joint: Node, params: list[nn.Parameter], grad: Tensor, leaves: Leaves) -> bool:
    """W of a linear layer without autograd; False if ``joint`` is nothing of the kind, or somebody has hooks there."""
    if joint.name() not in ("MmBackward0", "AddmmBackward0"):
        return False
    transposed = joint.next_functions[-1][0]
    if transposed is None or transposed.name() != "TBackward0":
        return False
    following = transposed.next_functions[0][0]
    weight = None if following is None else leaves.get(following)
    biases = [param for param in params if param is not weight]
    if weight is None or len(biases) == len(params) or any(bias.shape != grad.shape[1:] for bias in biases):
        return False
    if any(param._backward_hooks or param._post_accumulate_grad_hooks for param in params):
        return False
    with_bias = joint.name() == "AddmmBackward0"
    if with_bias and (joint._saved_alpha, joint._saved_beta) != (1, 1):  # type: ignore[attr-defined]
        return False
    x = joint._saved_mat1 if with_bias else joint._saved_self  # type: ignore[attr-defined]
    if x is None or not x.dtype == grad.dtype == weight.dtype or grad.is_complex():
        return False
    with torch.no_grad():
        if weight.grad is None:
            weight.grad = grad.t() @ x
        else:
            weight.grad.addmm_(grad.t(), x)
        for bias in biases:
            _accumulate(bias, grad.sum(0))
    return True


def _accumulate(param: nn.Parameter, grad: Tensor) -> None:
    with torch.no_grad():
        if param.grad is None:
            param.grad = grad
        else:
            param.grad += grad


def _branches(root: GradientEdge, leaves: Leaves) -> Iterator[tuple[Node | None, nn.Parameter]]:
    """Every way to a parameter as (joint, parameter); joint None: it cannot be split off."""
    ends: dict[Node, nn.Parameter | None] = {}
    alone = _end_of_chain(root.node, leaves, ends)
    if alone is not None:
        yield None, alone
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


def _end_of_chain(node: Node, leaves: Leaves, known: dict[Node, nn.Parameter | None]) -> nn.Parameter | None:
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
