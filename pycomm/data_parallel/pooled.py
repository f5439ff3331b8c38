"""Gradients that pass by (ZeRO-2): of the averages each rank keeps its shard, and nothing else stays.

A bucket that is complete is copied, message by message, into one of two small symmetric buffers, averaged from there
into the shards of all ranks, and its ``.grad`` freed. Messages carry whole norm blocks, so a parameter of any size goes
through buffers of any size.

Ref: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5.2.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pycomm import _C
from pycomm.data_parallel.gradients import Gradients
from pycomm.data_parallel.layout import NORM_BLOCK, Bucket, Family, Run, TrainedParam
from pycomm.data_parallel.partial import AbsentGradient

_NUM_BUFFERS = 2  # one is filled while the other travels
_PART_OF_GRADIENTS = 64  # a buffer has at most this part of all gradients, so that the pool is small beside them
_MIN_BYTES = 64 * 1024


Piece = tuple[TrainedParam, slice, int]  # elements of a parameter's gradient, and where in a message they start


@dataclass(eq=False)
class Message:
    """What one buffer carries at a time."""

    pieces: list[Piece]
    numel: int

    def runs(self) -> list[Run]:
        """What this rank owns of it."""
        return [p.run(p.shard, grad=start - cut.start, within=cut) for p, cut, start in self.pieces]


class PooledGradients(Gradients):
    """This rank's shard of the averages, added up over backwards until the optimizer takes it or they are zeroed.

    While there are averages, ``.grad`` of every parameter is an AbsentGradient, except of those that have accumulated
    under no_sync() since.
    """

    packed = True

    def _allocate(self) -> None:
        self.buffers = {f: torch.zeros(max(1, f.num_owned), dtype=f.grad_dtype) for f in self.families}
        self._is_zero = True  # what the shards have does not count: the next average overwrites it
        all_bytes = sum(trained.grad_bytes for trained in self.params)
        num_bytes = min(self.options.cap_bytes, max(_MIN_BYTES, all_bytes // _PART_OF_GRADIENTS))
        # A piece of every dtype fits: at least one norm block of the widest.
        self._pool_bytes = max(NORM_BLOCK * 8, num_bytes // NORM_BLOCK * NORM_BLOCK)
        self._pool = [self._memory(self._pool_bytes, torch.uint8) for _ in range(_NUM_BUFFERS)]
        self._num_sent = 0
        self._is_shown = False  # by .grad of the parameters
        self._shown = [AbsentGradient.standing_for(trained, weakref.ref(self)) for trained in self.params]
        for trained in self.params:
            trained.param.register_hook(partial(_before_accumulation, weakref.ref(self)))

    def before_backward(self) -> None:
        """Autograd shall store fresh gradients, not add to what stands for averages."""
        self._notice_zeroing()
        if self._is_shown:
            self._is_shown = False
            for trained in self.params:
                if isinstance(trained.param.grad, AbsentGradient):
                    trained.param.grad = None

    def keep(self, trained: TrainedParam) -> None:
        pass  # it lies in autograd's own tensor until its bucket is launched

    def launch(self, bucket: Bucket) -> None:
        for message, runs in self._messages[bucket]:
            self._send(message, runs, bucket.family)
        for trained in bucket.params:
            trained.param.grad = None

    def wait(self) -> bool:
        super().wait()
        self._is_zero = False
        self._norms_hold = self.one_pass
        self._is_shown = True
        for trained, absent in zip(self.params, self._shown, strict=True):
            trained.param.grad = absent
        return True

    def drop(self) -> None:
        self.were_zeroed()
        for trained in self.params:
            trained.param.grad = None

    def were_zeroed(self) -> None:
        self.before_backward()
        self._forget()

    def are_complete(self) -> bool:
        self._notice_zeroing()
        return not self._is_zero

    def parts(self, trained: TrainedParam) -> list[tuple[int, Tensor]]:
        self._norms_hold = False
        own = self._own(trained)
        averaged = [] if own is None else [(trained.shard.begin, own)]
        grad = trained.param.grad
        return averaged if grad is None or isinstance(grad, AbsentGradient) else [*averaged, (0, grad)]

    def _own(self, trained: TrainedParam) -> Tensor | None:
        return None if self._is_zero else trained.shard.of(self.buffers[trained.family])

    def _notice_zeroing(self) -> None:
        """zero_grad() of the plain module takes away what stands for the averages, and so the averages."""
        if self._is_shown and all(trained.param.grad is None for trained in self.params):
            self._is_shown = False
            self._forget()

    def _forget(self) -> None:
        self._is_zero, self._norms_hold = True, False

    def _lay_out(self) -> None:
        self.layout += 1
        self._messages = {
            bucket: [
                (message, _C.Runs(message.runs()))
                for message in messages_of(bucket, self._pool_bytes // self._dtype(bucket.family).itemsize)
            ]
            for bucket in self.buckets
        }

    def _dtype(self, family: Family) -> torch.dtype:
        return self.options.wire_dtype or family.grad_dtype

    def _send(self, message: Message, runs: _C.Runs, family: Family) -> None:
        if len(self._under_way) == _NUM_BUFFERS:
            self._finish_oldest()  # which is in the buffer that comes next
        memory = self._pool[self._num_sent % _NUM_BUFFERS].view(self._dtype(family))[: message.numel]
        self._num_sent += 1
        _fill(memory, message)
        shard, accumulate = self.buffers[family], not self._is_zero
        then = None if self.one_pass else partial(_take, memory, message, shard, accumulate)
        self._average(memory, runs, to_all=False, shard=shard, accumulate=accumulate, then=then)


def messages_of(bucket: Bucket, capacity: int) -> list[Message]:
    """Cut a bucket into messages of at most ``capacity`` elements, and parameters between norm blocks only."""
    messages: list[Message] = []
    for trained in bucket.params:
        begin, numel = 0, trained.param.numel()
        while begin < numel:
            free = capacity - messages[-1].numel if messages else 0
            length = numel - begin if numel - begin <= free else free // NORM_BLOCK * NORM_BLOCK
            if length == 0:
                messages.append(Message([], 0))
                continue
            message = messages[-1]
            message.pieces.append((trained, slice(begin, begin + length), message.numel))
            message.numel += length
            begin += length
    return messages


@torch.no_grad()
def _fill(memory: Tensor, message: Message) -> None:
    for trained, elements, start in message.pieces:
        target = memory[start : start + elements.stop - elements.start]
        if trained.param.grad is None:
            target.zero_()
        else:
            target.copy_(trained.in_memory_order(trained.param.grad)[elements])


def _take(averages: Tensor, message: Message, shard: Tensor, accumulate: bool) -> None:
    """Of averages on every rank, keep what this rank owns."""
    for run in message.runs():
        average, target = averages[run.grad : run.grad + run.numel], shard[run.packed : run.packed + run.numel]
        if accumulate:
            target.add_(average)
        else:
            target.copy_(average)


def _before_accumulation(gradients: weakref.ref[PooledGradients], _grad: Tensor) -> None:
    live = gradients()
    if live is not None:
        live.before_backward()
