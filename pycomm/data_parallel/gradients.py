"""What both kinds of gradient memory, ``flat.py`` and ``pooled.py``, have in common: buckets, launches, norms.

The engine decides when a bucket is launched; a :class:`Gradients` says where its memory is and how it is averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycomm.communicator import Communicator, Work
from pycomm.data_parallel.bucket import Bucket, Family, Slot, plan
from pycomm.data_parallel.shards import num_blocks
from pycomm.errors import PycommError


@dataclass(frozen=True)
class Options:
    """How gradients travel; the arguments of DataParallel."""

    cap_bytes: int
    overlap: bool
    symmetric: bool
    wire_dtype: torch.dtype | None = None


class Gradients(ABC):
    """The gradients of one model on this rank."""

    def __init__(self, slots: Sequence[Slot], families: Sequence[Family], comm: Communicator, options: Options) -> None:
        self.slots = slots
        self.families = families
        self.comm = comm
        self.options = options
        self.fused = options.symmetric and comm.has_fused_calls
        self.buckets = plan(list(reversed(slots)), options.cap_bytes)  # backward reaches the last layers first
        self.unreduced = False  # the optimizer's step has to average them
        self.layout = 0  # counts the times that gradients moved to other places
        # Squared norms of the blocks that this rank averaged; zeros elsewhere.
        self._norms = torch.zeros(sum(num_blocks(slot.param.numel()) for slot in slots), dtype=torch.float64)
        self._under_way: list[tuple[Work, Callable[[], None] | None]] = []

    stay: bool  # until they are zeroed; else until the optimizer takes them

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory for gradients on this rank, what travels included."""

    @abstractmethod
    def before_backward(self) -> None:
        """Autograd is about to accumulate."""

    @abstractmethod
    def keep(self, slot: Slot) -> None:
        """Autograd has stored or accumulated ``slot.param.grad``."""

    @abstractmethod
    def has_earlier(self, slot: Slot) -> bool:
        """Whether a slot without a gradient from this backward has one that was not averaged yet."""

    @abstractmethod
    def keep_zeros(self, slot: Slot) -> None:
        """The parameter got no gradient on this rank, which counts as zeros."""

    @abstractmethod
    def launch(self, bucket: Bucket) -> None:
        """Start averaging a bucket, whose gradients are all there."""

    @abstractmethod
    def reorder(self, slots: Sequence[Slot]) -> None:
        """Rebuild the buckets for gradients that get ready in this order. Nothing is under way."""

    @abstractmethod
    def drop(self) -> None:
        """Zero all gradients."""

    @abstractmethod
    def were_zeroed(self) -> None:
        """By zero_grad()."""

    @abstractmethod
    def are_complete(self) -> bool:
        """For the optimizer: whether there are gradients; False if all were zeroed. Raises if some were."""

    @abstractmethod
    def were_taken(self) -> None:
        """By the optimizer, which has averaged them if they were ``unreduced``."""

    @abstractmethod
    def give_back(self) -> None:
        """Free the memory; not to be used any more."""

    @abstractmethod
    def norm_table(self) -> Tensor:
        """[num_blocks]: squared norms of all blocks of the averages. Collective; the same bits on every rank."""

    @abstractmethod
    def parts(self, slot: Slot) -> list[tuple[int, Tensor]]:
        """All that counts of a parameter's gradient on this rank, to be changed in place. Collective.

        Each with the place in the parameter where it starts: this rank's shard, or all of it.
        """

    @abstractmethod
    def scale(self, factor: float) -> None:
        """Multiply the averages."""

    def wait(self) -> None:
        """Return when all that was launched is done; then raise the first error."""
        errors = []
        for work, then in self._under_way:
            try:
                work.wait()
                if then is not None:
                    then()
            except PycommError as error:
                errors.append(error)
        # Also after an error: hooks of the next backward must not write to a bucket that still travels.
        self._under_way.clear()
        if errors:
            raise errors[0]

    def _started(self, work: Work | None, then: Callable[[], None] | None) -> None:
        if work is not None:
            self._under_way.append((work, then))
        elif then is not None:
            then()

    def _memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        """[at least 1] zeros for what travels. Collective if symmetric."""
        if not self.options.symmetric:
            return torch.zeros(max(1, numel), dtype=dtype)
        # Symmetric memory may be a reused segment: without zeroing, the gaps would carry old values, NaN perhaps.
        return self.comm.empty(max(1, numel), dtype=dtype).zero_()

    def _all_ranks(self, table: Tensor) -> Tensor:
        """Sum tables of which each rank has its own blocks and zeros elsewhere: exact. Collective."""
        self.comm.all_reduce(table)
        return table
