"""The collectives of a Communicator: the methods that all ranks call together.

The extension checks their arguments, for every back end (csrc/bindings/bind_collectives.cpp). docs/algorithms.md has
steps, bytes and order of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pycomm._C import Work
from pycomm.backends import Backend

__all__ = ["Collectives"]


class Collectives:
    """What all ranks of a communicator call together, in the same order.

    Tensors are contiguous and of any shape: parts are runs of elements. Splits are counts along dim 0, one a rank, the
    same on all ranks but for :meth:`all_to_all`; without splits all parts are equal. Reductions take float32 float64
    float16 bfloat16 int8 uint8 int32 int64; the other calls take bool, too. 16-bit floats accumulate in fp32 and
    round once, in rank order. A part of a call that is the same on all ranks is matched: ``MismatchError`` otherwise.
    """

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self.rank = backend.rank
        self.world_size = backend.world_size
        self.device = backend.device
        self._backend = backend
        self._calls = backend.calls()
        self._timeout_s = timeout_s

    @property
    def timeout_s(self) -> float:
        """Seconds that any wait for another rank may take, in calls that are given no other."""
        return self._timeout_s

    def all_reduce(
        self, tensor: Any, op: str = "sum", *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Reduce ``tensor`` over all ranks, in place, in rank order: the bits are the same on every rank.

        Push two-shot on symmetric tensors (2 x bytes touched a rank), staged in slices on others, one-shot when tiny.

        Args:
            tensor: same dtype and number of elements on every rank (shapes may differ).
            op: "sum", "avg" (floating point only), "min", "max" or "prod".
        """
        return self._calls.all_reduce(tensor, op, async_op, timeout_s)

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
        return self._calls.reduce(tensor, root, op, async_op, timeout_s)

    def scan(
        self, tensor: Any, op: str = "sum", *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Reduce ``tensor`` over the ranks up to this one, in place and in rank order: an inclusive prefix.

        With "sum" of each rank's number of tokens, rank r learns where its own end among those of all ranks. The bits
        of the last rank are those of :meth:`all_reduce` where that adds in rank order. On NCCL, which adds in an order
        of its own, it takes memory of n times the tensor.

        Args:
            tensor: same dtype and number of elements on every rank.
            op: "sum", "min", "max" or "prod".
        """
        return self._calls.scan(tensor, op, async_op, timeout_s)

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
        return self._calls.reduce_scatter(output, input, op, input_splits, async_op, timeout_s)

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
        return self._calls.all_gather(output, input, output_splits, async_op, timeout_s)

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
        return self._calls.all_to_all(output, input, output_splits, input_splits, async_op, timeout_s)

    def broadcast(
        self, tensor: Any, root: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Copy ``tensor`` of rank ``root`` to ``tensor`` of every rank.

        Args:
            tensor: same dtype and number of elements on every rank.
        """
        return self._calls.broadcast(tensor, root, async_op, timeout_s)

    def gather(
        self, output: Any, input: Any, root: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Leave the ``input`` of all ranks in the ``output`` of rank ``root``, one after the other.

        Args:
            output: [n x N] at the root, None elsewhere.
            input: [N], the same N on every rank. At the root it may be exactly its part of ``output``, else disjoint.
        """
        return self._calls.gather(output, input, root, async_op, timeout_s)

    def scatter(
        self, output: Any, input: Any, root: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Copy part r of the ``input`` of rank ``root`` to the ``output`` of rank r.

        Args:
            output: [N], the same N on every rank. At the root it may be exactly its part of ``input``, else disjoint.
            input: [n x N] at the root, None elsewhere.
        """
        return self._calls.scatter(output, input, root, async_op, timeout_s)

    def barrier(self, *, async_op: bool = False, timeout_s: float | None = None) -> Work | None:
        """Return once every rank has called it."""
        return self._calls.barrier(async_op, timeout_s)
