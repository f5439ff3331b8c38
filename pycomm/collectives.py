"""The collectives of a Communicator: the methods that all ranks call together.

They check their arguments and hand memory to the back end. docs/algorithms.md has steps, bytes and order of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pycomm.arguments import check_apart, check_numel, split_counts, tensor_on
from pycomm.calls import Calls, Work

__all__ = ["Collectives"]


class Collectives(Calls):
    """What all ranks of a communicator call together, in the same order.

    Tensors are contiguous and of any shape: parts are runs of elements. Splits are counts along dim 0, one a rank, the
    same on all ranks but for :meth:`all_to_all`; without splits all parts are equal. Reductions take float32 float64
    float16 bfloat16 int8 uint8 int32 int64; the other calls take bool, too. 16-bit floats accumulate in fp32 and
    round once, in rank order. A part of a call that is the same on all ranks is matched: ``MismatchError`` otherwise.
    """

    def all_reduce(
        self, tensor: Any, op: str = "sum", *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Reduce ``tensor`` over all ranks, in place, in rank order: the bits are the same on every rank.

        Push two-shot on symmetric tensors (2 x bytes touched a rank), staged in slices on others, one-shot when tiny.

        Args:
            tensor: same dtype and number of elements on every rank (shapes may differ).
            op: "sum", "avg" (floating point only), "min", "max" or "prod".
        """
        tensor = tensor_on(self.device, tensor)
        return self._outcome(self._backend.all_reduce(tensor, op, async_op, self._timeout(timeout_s)), tensor)

    def reduce(
        self,
        tensor: Any,
        root: int = 0,
        op: str = "sum",
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Work | None:
        """Reduce ``tensor`` over all ranks into ``tensor`` of rank ``root``; the others' stay as they are.

        The bits are those of :meth:`all_reduce`, and so is the algorithm.

        Args:
            tensor: same dtype and number of elements on every rank.
            op: as in :meth:`all_reduce`.
        """
        tensor = tensor_on(self.device, tensor)
        return self._outcome(self._backend.reduce(tensor, root, op, async_op, self._timeout(timeout_s)), tensor)

    def reduce_scatter(
        self,
        output: Any,
        input: Any,
        op: str = "sum",
        input_splits: Sequence[int] | None = None,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Work | None:
        """Reduce ``input`` over all ranks and leave part ``rank`` in ``output``. The bits are those of all_reduce.

        Direct: every rank reads its part of everyone's input, (n-1)/n x input bytes.

        Args:
            output: [part ``rank``], dtype of ``input``. May be exactly that part of ``input``, else disjoint.
            input: [N], the parts of all ranks one after the other.
            op: as in :meth:`all_reduce`.
            input_splits: rows (dim 0 of ``input``) of each rank's part; None: N / n elements each.
        """
        output = tensor_on(self.device, output, "output")
        input = tensor_on(self.device, input, "input")
        counts = split_counts(input, input_splits, self.world_size, "input")
        self._check_part(output, input, part=output, counts=counts, owner=self.rank)
        core = self._backend.reduce_scatter(output, input, counts, op, async_op, self._timeout(timeout_s))
        return self._outcome(core, output, input)

    def all_gather(
        self,
        output: Any,
        input: Any,
        output_splits: Sequence[int] | None = None,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Work | None:
        """Leave the ``input`` of all ranks in everyone's ``output``, one after the other.

        Push where all outputs are symmetric (fastest), else pull, through staging unless the inputs are symmetric.

        Args:
            output: [N], dtype of ``input``.
            input: [part ``rank``]. May be exactly that part of ``output``, else disjoint.
            output_splits: rows (dim 0 of ``output``) of each rank's part; None: N / n elements each.
        """
        output = tensor_on(self.device, output, "output")
        input = tensor_on(self.device, input, "input")
        counts = split_counts(output, output_splits, self.world_size, "output")
        self._check_part(output, input, part=input, counts=counts, owner=self.rank)
        core = self._backend.all_gather(output, input, counts, async_op, self._timeout(timeout_s))
        return self._outcome(core, output, input)

    def all_to_all(
        self,
        output: Any,
        input: Any,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Work | None:
        """Copy part d of rank s's ``input`` to part s of rank d's ``output``, for all s and d.

        Direct: every rank reads its part of everyone's input. With splits the ranks show each other theirs first.

        Args:
            output: [M], dtype of ``input``, disjoint from it.
            input: [N].
            output_splits: rows (dim 0 of ``output``) from each rank; None: M / n elements each.
            input_splits: rows (dim 0 of ``input``) for each rank; None: N / n elements each. Either all ranks pass
                splits or none does; as elements, those of a pair of ranks must agree.
        """
        output = tensor_on(self.device, output, "output")
        input = tensor_on(self.device, input, "input")
        check_apart(output, input, None)
        input_counts = split_counts(input, input_splits, self.world_size, "input")
        timeout_s = self._timeout(timeout_s)
        if output_splits is None and input_splits is None:
            check_numel(output, input.numel(), "output")
            core = self._backend.all_to_all(output, input, input_counts, async_op, timeout_s)
        else:
            output_counts = split_counts(output, output_splits, self.world_size, "output")
            core = self._backend.all_to_all_by_splits(output, input, output_counts, input_counts, async_op, timeout_s)
        return self._outcome(core, output, input)

    def broadcast(
        self, tensor: Any, root: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Copy ``tensor`` of rank ``root`` to ``tensor`` of every rank.

        Args:
            tensor: same dtype and number of elements on every rank.
        """
        tensor = tensor_on(self.device, tensor)
        return self._outcome(self._backend.broadcast(tensor, root, async_op, self._timeout(timeout_s)), tensor)

    def gather(
        self, output: Any, input: Any, root: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Leave the ``input`` of all ranks in the ``output`` of rank ``root``, one after the other.

        Args:
            output: [n x N] at the root, None elsewhere.
            input: [N], the same N on every rank. At the root it may be exactly its part of ``output``, else disjoint.
        """
        input = tensor_on(self.device, input, "input")
        output = self._only_at_root(output, root, "output")
        counts = [input.numel()] * self.world_size
        if output is not None:
            check_numel(output, sum(counts), "output")
            self._check_part(output, input, part=input, counts=counts, owner=root)
        core = self._backend.gather(output, input, counts, root, async_op, self._timeout(timeout_s))
        return self._outcome(core, output, input)

    def scatter(
        self, output: Any, input: Any, root: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Copy part r of the ``input`` of rank ``root`` to the ``output`` of rank r.

        Args:
            output: [N], the same N on every rank. At the root it may be exactly its part of ``input``, else disjoint.
            input: [n x N] at the root, None elsewhere.
        """
        output = tensor_on(self.device, output, "output")
        input = self._only_at_root(input, root, "input")
        counts = [output.numel()] * self.world_size
        if input is not None:
            check_numel(input, sum(counts), "input")
            self._check_part(output, input, part=output, counts=counts, owner=root)
        core = self._backend.scatter(output, input, counts, root, async_op, self._timeout(timeout_s))
        return self._outcome(core, output, input)

    def barrier(self, *, async_op: bool = False, timeout_s: float | None = None) -> Work | None:
        """Return once every rank has called it."""
        return self._outcome(self._backend.barrier(async_op, self._timeout(timeout_s)))

    def _check_part(
        self, output: torch.Tensor, input: torch.Tensor, *, part: torch.Tensor, counts: list[int], owner: int
    ) -> None:
        """``part``, one of the two, is as long as part ``owner`` of the other, and lies there or elsewhere."""
        whole, name = (output, "input") if part is input else (input, "output")
        check_numel(part, counts[owner], name)
        check_apart(output, input, (whole, sum(counts[:owner]), counts[owner]))

    def _only_at_root(self, tensor: Any, root: int, name: str) -> torch.Tensor | None:
        if not 0 <= root < self.world_size:
            raise ValueError(f"root is {root}, it must be 0 to {self.world_size - 1}")
        if self.rank == root:
            if tensor is None:
                raise ValueError(f"{name} is None on rank {root}, the root, which needs it")
            return tensor_on(self.device, tensor, name)
        if tensor is not None:
            raise ValueError(f"{name} belongs to rank {root}, the root: pass None on rank {self.rank}")
        return None
