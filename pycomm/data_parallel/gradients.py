"""What both kinds of gradient memory, ``flat.py`` and ``pooled.py``, have in common: buckets, averages, norms.

The engine decides when a bucket is launched; a :class:`Gradients` says where its memory is and how it is averaged.

Squared norms are taken block by block, each sum in fp64, and added in (parameter, block) order, so a norm has the same
bits whatever the buckets, the shards and the number of passes that it took (docs/determinism.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycomm import _C
from pycomm.communicator import Communicator, Work
from pycomm.data_parallel.layout import Bucket, Family, Run, TrainedParam, num_blocks, plan
from pycomm.data_parallel.step import Step
from pycomm.errors import PycommError
from pycomm.fused import dtype_name


@dataclass(frozen=True)
class Options:
    """The arguments of DataParallel."""

    cap_bytes: int
    overlap: bool
    symmetric: bool
    wire_dtype: torch.dtype | None = None
    find_unused: bool = False


class Gradients(ABC):
    """The gradients of one model on this rank."""

    packed: bool  # only this rank's shards, which the optimizer uses up; else whole, until they are zeroed

    def __init__(self, params: Sequence[TrainedParam], comm: Communicator, options: Options, step: Step) -> None:
        self.params = params
        self.families = list(dict.fromkeys(trained.family for trained in params))
        self.comm = comm
        self.options = options
        self.step = step
        self.one_pass = options.symmetric and comm.capabilities.has_fused_step  # averages and their norms
        self.buffers: dict[Family, Tensor] = {}  # what the optimizer reads
        self.starts: dict[TrainedParam, int] = {}  # of whole gradients in their buffers
        self.buckets = plan(list(reversed(params)), options.cap_bytes)  # backward reaches the last layers first
        self.layout = 0  # counts the times that gradients moved to other places
        # Squared norms of the blocks that this rank owns; zeros elsewhere.
        self._norms = torch.zeros(sum(num_blocks(trained.param.numel()) for trained in params), dtype=torch.float64)
        self._norms_hold = False  # as far as known, they are those of the averages
        self._under_way: list[tuple[Work, Callable[[], object] | None]] = []
        self._travels: list[Tensor] = []  # memory
        self._allocate()
        self._lay_out()

    @property
    def num_bytes(self) -> int:
        """Memory for gradients on this rank, what travels included."""
        return sum({id(memory): memory.nbytes for memory in (*self.buffers.values(), *self._travels)}.values())

    @abstractmethod
    def before_backward(self) -> None:
        """Autograd is about to accumulate."""

    @abstractmethod
    def keep(self, trained: TrainedParam) -> None:
        """Autograd has stored or accumulated the parameter's ``.grad``, or the user has; none counts as zeros."""

    @abstractmethod
    def launch(self, bucket: Bucket) -> None:
        """Start averaging a bucket, whose gradients are all there."""

    @abstractmethod
    def drop(self) -> None:
        """Zero all gradients."""

    @abstractmethod
    def were_zeroed(self) -> None:
        """By zero_grad()."""

    @abstractmethod
    def are_complete(self) -> bool:
        """For the optimizer: whether there are gradients; False if all were zeroed. Raises if some were."""

    def were_taken(self) -> None:
        """By the optimizer, which has averaged them if that was left to it."""
        self.were_zeroed()

    @abstractmethod
    def parts(self, trained: TrainedParam) -> list[tuple[int, Tensor]]:
        """All that counts of a parameter's gradient on this rank, to be changed in place. Collective.

        Each with the place in the parameter where it starts: this rank's shard, or all of it.
        """

    def wait(self) -> bool:
        """Return when all that was launched is done, or raise the first error: whether gradients are averaged now.

        If not, the optimizer's step averages them.
        """
        errors = []
        while self._under_way:
            try:
                self._finish_oldest()
            except PycommError as error:
                # The others, too: hooks of the next backward must not write to a bucket that still travels.
                errors.append(error)
                self._under_way.pop(0)
        if errors:
            raise errors[0]
        return True

    def reorder(self, params: Sequence[TrainedParam]) -> None:
        """Rebuild the buckets for gradients that get ready in this order. Nothing is under way."""
        self.buckets = plan(params, self.options.cap_bytes)
        self._lay_out()

    def norm_table(self) -> Tensor:
        """[num_blocks]: squared norms of all blocks of the averages. Collective; the same bits on every rank.

        Every rank has those that it owns, from the averaging itself where they are still true, and zeros elsewhere: so
        the sum is exact.
        """
        table = self._norms.clone()
        if not self._norms_are_true():
            table.zero_()
            for trained in self.params:
                own = self._own(trained)
                if own is not None:
                    block_norms(own, [trained.run(trained.shard, grad=-trained.shard.begin)], table)
        self.comm.all_reduce(table)
        return table

    def _norms_are_true(self) -> bool:
        return self._norms_hold

    @abstractmethod
    def _allocate(self) -> None:
        """Collective if symmetric."""

    @abstractmethod
    def _own(self, trained: TrainedParam) -> Tensor | None:
        """This rank's shard of the average, if there is one."""

    @abstractmethod
    def _lay_out(self) -> None:
        """Give every gradient its place."""

    def _average(
        self,
        message: Tensor,
        runs: _C.Runs,
        *,
        to_all: bool,
        shard: Tensor | None = None,
        accumulate: bool = False,
        then: Callable[[], object] | None = None,
    ) -> None:
        """Start averaging a message over the ranks, in place; in one pass, the owned runs may go to ``shard`` instead.

        Args:
            accumulate: add the averages to what the shard has.
            then: to be called when it is done.
        """
        work: Work | None
        if self.one_pass:
            reduction = _C.GradientReduction(
                grads=message.data_ptr(),
                count=message.numel(),
                dtype=dtype_name(message.dtype),
                runs=runs,
                to_all=to_all,
                shard=0 if shard is None else shard.data_ptr(),
                shard_dtype=dtype_name((message if shard is None else shard).dtype),
                norms=self._norms.data_ptr(),
            )
            work = self.comm.reduce_gradients(reduction, message, accumulate=accumulate, async_op=self.options.overlap)
        else:
            work = self.comm.all_reduce(message, op="avg", async_op=self.options.overlap)
        if work is not None:
            self._under_way.append((work, then))
        elif then is not None:
            then()

    def _finish_oldest(self) -> None:
        work, then = self._under_way[0]
        work.wait()
        if then is not None:
            then()
        del self._under_way[0]

    def _memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        """[at least 1] zeros for what travels. Collective if symmetric."""
        empty = self.comm.empty if self.options.symmetric else torch.empty
        # Symmetric memory may be a reused segment: without zeroing, the gaps would carry old values, NaN perhaps.
        self._travels.append(empty(max(1, numel), dtype=dtype).zero_())
        return self._travels[-1]


def block_norms(values: Tensor, runs: _C.Runs | Sequence[Run], table: Tensor) -> None:
    """Fill ``table`` for runs of ``values``, where their ``grad`` says."""
    native = runs if isinstance(runs, _C.Runs) else _C.Runs(runs)
    _C.block_norms(values.data_ptr(), dtype_name(values.dtype), native, table.data_ptr())


def check_on_host(what: str, tensors: Iterable[tuple[str, Tensor]], instead: str) -> None:
    """Raise NotImplementedError for what is not on the CPU: the passes over gradients read memory by its address.

    Args:
        what: needs them there.
        tensors: each with what the error calls it.
        instead: what works on other devices.
    """
    for name, tensor in tensors:
        if tensor.device.type != "cpu":
            raise NotImplementedError(
                f"{what} works on the CPU alone as yet, and {name} is on {tensor.device}; {instead}"
            )
