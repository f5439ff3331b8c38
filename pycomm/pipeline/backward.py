"""Backward in two halves: gradients of the input now (B), gradients of the weights later (W).

Works on the graph that autograd has recorded, for any module. A *joint* is a node from which a branch leads to nothing
but one parameter: the product of a linear layer, a convolution. B lets the gradient flow through the graph to the input
and catches what enters each joint; autograd computes there only what flows on. W later sends what was caught into each
joint's branch to its parameter. Nothing is computed twice, where the joint is a node that asks autograd, as torch's own
do, or its attribute ``half``, as those of pycomm.tensor_parallel do, for what is wanted of it.

A linear layer needs no graph for that: its input and what was caught are enough. W adds their product to ``.grad`` in
the multiplication itself, which rounds once less than autograd would. If all joints of a stage are such, the graph with
everything else that it has saved is gone after B.

Vectors, such as the scales of norms, are not worth a second visit, and get their gradients in B. So do a parameter that
several joints lead to by different ways (tied weights in one stage), and what lies behind a node with several outputs.
Where all ways to a parameter end in one, as in a table that is looked up for a residual stream, or where the joint is a
sum, B catches what enters that last part, which is small, and W makes the table's gradient of it.

Ref: "Zero Bubble Pipeline Parallelism" (2023), section 2.1; the graph is cut as torch.distributed.pipelining does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["Leaves", "SplitBackward", "leaves_of"]

Leaves = Mapping[Node, nn.Parameter]
_SUMS = frozenset({"AddBackward0", "SubBackward0"})


def leaves_of(params: Iterable[nn.Parameter]) -> Leaves:
    """Where autograd puts the gradients of those that need one; valid until ``requires_grad`` of one changes."""
    return {get_gradient_edge(param).node: param for param in params if param.requires_grad}


class SplitBackward:
    """The two halves of one micro-batch's backward from ``output``.

    Args:
        output: what the stage returned, or its loss. Drop it after :meth:`inputs`, so that its graph can go.
        leaves: of the parameters whose gradients are wanted.
    """

    def __init__(self, output: Tensor, leaves: Leaves) -> None:
        self._output: Tensor | None = output
        branches = list(_branches(get_gradient_edge(output), leaves))
        entries = _common_entries(branches, leaves)
        apart = {id(param) for param in entries.values()}
        branches = [branch for branch in branches if id(branch.param) not in apart]
        uses = Counter(id(branch.param) for branch in branches)
        unsplit = {id(b.param) for b in branches if b.joint is None or uses[id(b.param)] > 1}
        # Joints of which nothing but vectors would be left for W.
        matrices = {b.joint for b in branches if b.param.ndim > 1 and id(b.param) not in unsplit}
        vectors = {b.joint for b in branches} - matrices
        unsplit |= {id(b.param) for b in branches if b.joint in vectors}
        self._at_once = list({id(b.param): b.param for b in branches if id(b.param) in unsplit}.values())
        at_once = {b.joint for b in branches if id(b.param) in unsplit}
        joints: dict[Node, list[nn.Parameter]] = {}
        for branch in branches:
            if branch.joint is not None and id(branch.param) not in unsplit:
                joints.setdefault(branch.joint, []).append(branch.param)
        # W goes through them backwards: tables last, when the rest of what is kept has gone.
        self._parts: list[_Linear | _Joint] = [
            _Joint(entry, [param], runs_in_b=False, has_halves=False) for entry, param in entries.items()
        ]
        self._parts += [
            _linear(joint, params, leaves) or _Joint(joint, params, runs_in_b=True, has_halves=joint not in at_once)
            for joint, params in joints.items()
        ]
        self._edges = [GradientEdge(node, 0) for node in (*entries, *joints)]
        self._caught: list[Tensor | None] = []

    def inputs(self, grad: Tensor | None, stage_input: Tensor | None) -> Tensor | None:
        """B: the gradient of ``stage_input`` (None: none is wanted), given that of the output (None: a scalar's, 1)."""
        wanted: list[Tensor | GradientEdge] = [*self._edges, *self._at_once]
        if stage_input is not None:
            wanted.append(stage_input)
        output, self._output = self._output, None
        if not wanted or output is None:
            return None
        found = torch.autograd.grad(
            [output],
            wanted,  # type: ignore[arg-type]  # torch takes both kinds in one list
            None if grad is None else [grad],
            retain_graph=any(isinstance(part, _Joint) and part.runs_in_b for part in self._parts),
            allow_unused=True,
        )
        self._caught = list(found[: len(self._edges)])
        self._edges.clear()
        for param, part in zip(self._at_once, found[len(self._caught) :], strict=False):
            if part is not None:
                # A copy: it may share memory with what came in, which is used again.
                _accumulate(param, part.clone() if param.grad is None else part)
        return found[-1] if stage_input is not None else None

    def weights(self) -> None:
        """W: accumulate into ``.grad`` what B left over. Once."""
        while self._parts and self._caught:
            part, grad = self._parts.pop(), self._caught.pop()
            if grad is not None:
                part.accumulate(grad)


class _Joint:
    """Any joint: autograd runs it, in W, for its parameters alone.

    Args:
        runs_in_b: it is run a second time then, so that B must leave what it has saved.
        has_halves: what B wants of it leaves the parameters alone.
    """

    def __init__(self, node: Node, params: list[nn.Parameter], *, runs_in_b: bool, has_halves: bool) -> None:
        self.node, self.params, self.runs_in_b = node, params, runs_in_b
        self._has_halves = has_halves and hasattr(node, "half")
        if self._has_halves:
            node.half = "inputs"  # type: ignore[attr-defined]

    def accumulate(self, grad: Tensor) -> None:
        if self._has_halves:
            self.node.half = "weights"  # type: ignore[attr-defined]
        torch.autograd.backward([GradientEdge(self.node, 0)], [grad], inputs=self.params)


@dataclass
class _Linear:
    """The joint of a linear layer, by the layer's input [rows, in]."""

    x: Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None

    def accumulate(self, grad: Tensor) -> None:
        with torch.no_grad():
            if self.weight.grad is None:
                self.weight.grad = grad.t() @ self.x
            else:
                self.weight.grad.addmm_(grad.t(), self.x)
            if self.bias is not None:
                _accumulate(self.bias, grad.sum(0))


_SAVED_INPUT = {"MmBackward0": "self", "AddmmBackward0": "mat1"}


def _linear(joint: Node, params: list[nn.Parameter], leaves: Leaves) -> _Linear | None:
    """``joint`` as a linear layer, if it is one as nn.Linear makes them and nobody has hooks there."""
    saved = _SAVED_INPUT.get(joint.name())
    transposed = joint.next_functions[-1][0]
    if saved is None or transposed is None or transposed.name() != "TBackward0":
        return None
    following = transposed.next_functions[0][0]
    weight = None if following is None else leaves.get(following)
    biases = [param for param in params if param is not weight]
    if weight is None or len(biases) == len(params) or any(bias.shape != weight.shape[:1] for bias in biases):
        return None
    if any(param._backward_hooks or param._post_accumulate_grad_hooks for param in params):  # DataParallel's, too
        return None
    if saved == "mat1" and (joint._saved_alpha, joint._saved_beta) != (1, 1):  # type: ignore[attr-defined]
        return None
    # Activation checkpointing would compute the whole block again for its input.
    if getattr(getattr(joint, f"_raw_saved_{saved}"), "unpack_hook", None) is not None:
        return None
    x: Tensor | None = getattr(joint, f"_saved_{saved}")
    if x is None or x.dtype != weight.dtype or weight.is_complex():
        return None
    return _Linear(x, weight, biases[0] if biases else None)


def _accumulate(param: nn.Parameter, grad: Tensor) -> None:
    with torch.no_grad():
        if param.grad is None:
            param.grad = grad
        else:
            param.grad += grad


class _Branch(NamedTuple):
    """A way to a parameter.

    Attributes:
        joint: where it leaves the rest of the graph; None: it cannot be split off.
        entry: its first node, from which nothing but ``param`` is reached.
    """

    joint: Node | None
    entry: Node
    param: nn.Parameter


def _common_entries(branches: Sequence[_Branch], leaves: Leaves) -> dict[Node, nn.Parameter]:
    """Where all ways to a matrix meet before they reach it, or enter it from a sum."""
    ways: dict[int, list[_Branch]] = {}
    for branch in branches:
        ways.setdefault(id(branch.param), []).append(branch)
    found = {}
    for first, *others in ways.values():
        if first.param.ndim < 2 or any(way.joint is None for way in (first, *others)):
            continue
        if not others and (first.joint is None or first.joint.name() not in _SUMS):
            continue
        chains = [_chain(way.entry, leaves) for way in (first, *others)]
        meet = next((node for node in chains[0] if all(node in chain for chain in chains)), None)
        if meet is not None and meet not in leaves:
            found[meet] = first.param
    return found


def _chain(entry: Node, leaves: Leaves) -> list[Node]:
    """From a branch's entry to its parameter; nothing if it passes an output of several."""
    chain = [entry]
    while chain[-1] not in leaves:
        following, output_nr = next(pair for pair in chain[-1].next_functions if pair[0] is not None)
        if output_nr or following is None:
            return []
        chain.append(following)
    return chain


def _branches(root: GradientEdge, leaves: Leaves) -> Iterator[_Branch]:
    """Every way to a parameter."""
    ends: dict[Node, nn.Parameter | None] = {}
    alone = _end_of_chain(root.node, leaves, ends)
    if alone is not None:
        yield _Branch(None, root.node, alone)
        return
    seen = {root.node}
    todo = [root.node]
    several_outputs = {root.node} if root.output_nr else set()
    found: list[_Branch] = []
    while todo:
        node = todo.pop()
        for following, output_nr in node.next_functions:
            if following is None:
                continue
            if output_nr:
                several_outputs.add(following)
            param = _end_of_chain(following, leaves, ends)
            if param is not None:
                found.append(_Branch(node, following, param))
                continue
            if following not in seen:
                seen.add(following)
                todo.append(following)
    for branch in found:
        whole = branch.joint not in several_outputs and branch.entry not in several_outputs
        yield branch if whole else branch._replace(joint=None)


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
