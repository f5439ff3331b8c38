"""The collectives of a group on several hosts: what the ranks compare of each call, and the steps that do it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from pycomm import _C
from pycomm.arguments import dtype_name
from pycomm.backends.gloo.calls import Call, call_of, hash_of_counts
from pycomm.backends.gloo.steps import Limit, Steps
from pycomm.backends.gloo.topology import parts_of

__all__ = ["Body", "HostsCollectives"]

Body = Callable[[Steps, Limit], None]


class HostsCollectives(ABC):
    """The collective part of :class:`pycomm.arguments.CheckedCalls`."""

    @abstractmethod
    def _run(self, call: Call, body: Body, async_op: bool, timeout_s: float) -> _C.Work | None:
        """Queue a collective; wait for it unless asynchronous."""

    def all_reduce(self, tensor: torch.Tensor, op: str, async_op: bool, timeout_s: float) -> _C.Work | None:
        call = call_of("all_reduce", tensor, op=op)
        flat = _numbers(tensor)
        return self._run(call, lambda steps, limit: steps.all_reduce(flat, op, limit), async_op, timeout_s)

    def broadcast(self, tensor: torch.Tensor, root: int, async_op: bool, timeout_s: float) -> _C.Work | None:
        call = call_of("broadcast", tensor, root=root)
        flat = _flat(tensor)
        return self._run(call, lambda steps, limit: steps.broadcast(flat, root, limit), async_op, timeout_s)

    def reduce(self, tensor: torch.Tensor, root: int, op: str, async_op: bool, timeout_s: float) -> _C.Work | None:
        call = call_of("reduce", tensor, op=op, root=root)
        flat = _numbers(tensor)
        return self._run(call, lambda steps, limit: steps.reduce(flat, root, op, limit), async_op, timeout_s)

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        counts: Sequence[int],
        op: str,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        call = call_of("reduce_scatter", input, op=op, splits=hash_of_counts(counts))
        out, flat = _numbers(output), _numbers(input)
        parts = parts_of([count * 2 for count in counts] if input.is_complex() else counts)

        def body(steps: Steps, limit: Limit) -> None:
            mine = steps.reduce_parts(flat, parts, op, limit)
            assert mine is not None  # every rank owns one
            out.copy_(mine)

        return self._run(call, body, async_op, timeout_s)

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None:
        call = call_of("all_gather", output, splits=hash_of_counts(counts))
        out, flat, parts = _flat(output), _flat(input), parts_of(counts)
        return self._run(call, lambda steps, limit: steps.gather_parts(out, parts, flat, limit), async_op, timeout_s)

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, counts: Sequence[int], async_op: bool, timeout_s: float
    ) -> _C.Work | None:
        call = call_of("all_to_all", input)
        out, flat = _flat(output), _flat(input)
        return self._run(
            call, lambda steps, limit: steps.all_to_all(out, flat, counts, counts, limit), async_op, timeout_s
        )

    def all_to_all_by_splits(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_counts: Sequence[int],
        input_counts: Sequence[int],
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        call = Call(0, "all_to_all", dtype_name(input.dtype), splits=1)
        out, flat = _flat(output), _flat(input)

        def body(steps: Steps, limit: Limit) -> None:
            steps.check_pairs(input_counts, output_counts, limit)
            steps.all_to_all(out, flat, output_counts, input_counts, limit)

        return self._run(call, body, async_op, timeout_s)

    def gather(
        self,
        output: torch.Tensor | None,
        input: torch.Tensor,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        call = call_of("gather", input, root=root, count=sum(counts))
        out, flat = None if output is None else _flat(output), _flat(input)
        return self._run(call, lambda steps, limit: steps.gather(out, flat, root, limit), async_op, timeout_s)

    def scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor | None,
        counts: Sequence[int],
        root: int,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        call = call_of("scatter", output, root=root, count=sum(counts))
        out, flat = _flat(output), None if input is None else _flat(input)
        return self._run(call, lambda steps, limit: steps.scatter(out, flat, root, limit), async_op, timeout_s)

    def barrier(self, async_op: bool, timeout_s: float) -> _C.Work | None:
        return self._run(Call(0, "barrier"), lambda steps, limit: None, async_op, timeout_s)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What is reduced: complex numbers are pairs of real ones, whose sums have the rules of real ones."""
    return torch.view_as_real(_flat(tensor)).view(-1) if tensor.is_complex() else _flat(tensor)
