"""Where everything lies: which elements of a parameter a rank owns, and which parameters share a bucket.

Pure functions of shapes, dtypes and an order, so every rank decides the same without asking, and optimizer states stay
where they are when buckets change. Norm blocks are cut from each parameter's start, in the order of its memory; their
squared norms are added in (parameter, block) order, which makes a norm independent of buckets and shards.

Ref: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2020), section 3.2;
Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pycomm import _C

NORM_BLOCK = _C.NORM_BLOCK  # elements
ALIGN_BYTES = 64  # a cache line: no two parameters share one, and vector loads never straddle


class Run(NamedTuple):
    """Consecutive elements of one parameter that this rank owns: csrc/host/gradient_step.hpp has the same."""

    grad: int
    param: int
    packed: int
    numel: int
    first_block: int
    group: int


@dataclass(frozen=True)
class Shard:
    """Elements [begin, end) of a parameter, at ``packed`` among all that its rank owns of these dtypes."""

    begin: int
    end: int
    packed: int

    def __len__(self) -> int:
        return self.end - self.begin

    def of(self, packed: Tensor) -> Tensor:
        """The shard's elements of ``packed``, which has all that the rank owns."""
        return packed[self.packed : self.packed + len(self)]


@dataclass(eq=False)
class Family:
    """Parameters of equal dtypes, in model order; they share buffers."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    params: list[TrainedParam] = field(default_factory=list)
    numel: int = 0  # padded
    num_owned: int = 0

    @property
    def has_master(self) -> bool:
        """16-bit parameters are updated in fp32, and those values are kept."""
        return self.param_dtype.itemsize == 2


@dataclass(eq=False)
class TrainedParam:
    """A trainable parameter, and its place in buffers."""

    index: int  # in model order
    name: str
    param: Tensor  # as the user has it
    family: Family
    start: int  # elements, in buffers of its family that keep the model's order
    first_block: int  # in the table of norms
    shard: Shard  # this rank's
    turn: int  # which rank has the first chunk: see owned()
    bucket_index: int = 0
    view: Tensor | None = None  # its gradient's memory in a bucket, with shape and strides of the parameter

    @cached_property
    def strides(self) -> tuple[int, ...]:
        return dense_strides(self.param)

    @property
    def blocks(self) -> slice:
        """Its rows in the table of norms."""
        return slice(self.first_block, self.first_block + num_blocks(self.param.numel()))

    @property
    def padded_numel(self) -> int:
        """Elements that it takes in a buffer: up to a multiple of ALIGN_BYTES in both dtypes of the family."""
        per_line = ALIGN_BYTES // min(self.family.param_dtype.itemsize, self.family.grad_dtype.itemsize)
        return -(-self.param.numel() // per_line) * per_line

    @property
    def grad_bytes(self) -> int:
        return self.padded_numel * self.family.grad_dtype.itemsize

    def run(self, shard: Shard, *, grad: int = 0, param: int = 0, group: int = 0, within: slice | None = None) -> Run:
        """The elements of ``shard``, or those ``within`` a piece of the parameter; none perhaps.

        Args:
            grad: where element 0 of the parameter lies among gradients.
            param: where it lies among parameters.
        """
        begin, end = shard.begin, shard.end
        if within is not None:
            begin = max(begin, within.start)
            end = max(begin, min(end, within.stop))
        block = self.first_block + begin // NORM_BLOCK
        return Run(grad + begin, param + begin, shard.packed + begin - shard.begin, end - begin, block, group)

    def view_in(self, flat: Tensor, start: int) -> Tensor:
        """The parameter's shape at element ``start`` of ``flat``."""
        return torch.as_strided(flat, self.param.shape, self.strides, flat.storage_offset() + start)

    def in_memory_order(self, tensor: Tensor) -> Tensor:
        """[numel] elements of ``tensor``, which has the parameter's shape, in the order of the parameter's memory."""
        if tensor.stride() != self.strides:
            tensor = torch.empty_strided(tensor.shape, self.strides, dtype=tensor.dtype).copy_(tensor)
        return torch.as_strided(tensor, (tensor.numel(),), (1,))


@dataclass(eq=False)
class Bucket:
    """Gradients that travel together: [numel] elements of one family, in the order in which they get ready."""

    params: list[TrainedParam]
    numel: int

    @property
    def family(self) -> Family:
        return self.params[0].family

    @property
    def num_bytes(self) -> int:
        return self.numel * self.family.grad_dtype.itemsize


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``tensor`` if it covers its memory without gaps (channels_last does), else of a dense copy."""
    return torch.empty_like(tensor, device="meta").stride()


def num_blocks(numel: int) -> int:
    return -(-numel // NORM_BLOCK)


def owned(numel: int, turn: int, rank: int, world_size: int) -> tuple[int, int]:
    """The elements [begin, end) of a parameter that ``rank`` owns: whole norm blocks.

    Chunks go round by ``turn``, usually the parameter's number in the model: the many parameters of a single block fall
    on different ranks.
    """
    chunk = (rank + turn) % world_size
    blocks = num_blocks(numel)
    begin, end = blocks * chunk // world_size, blocks * (chunk + 1) // world_size
    return min(numel, begin * NORM_BLOCK), min(numel, end * NORM_BLOCK)


def lay_out(named: Sequence[tuple[str, Tensor, torch.dtype]], rank: int, world_size: int) -> list[TrainedParam]:
    """The parameters in model order.

    Args:
        named: name, parameter, dtype of its gradient.
    """
    params: list[TrainedParam] = []
    families: dict[tuple[torch.dtype, torch.dtype], Family] = {}
    first_block = 0
    for index, (name, param, grad_dtype) in enumerate(named):
        family = families.setdefault((param.dtype, grad_dtype), Family(param.dtype, grad_dtype))
        turn = getattr(param, "shard_turn", index)
        shard = Shard(*owned(param.numel(), turn, rank, world_size), family.num_owned)
        params.append(TrainedParam(index, name, param, family, family.numel, first_block, shard, turn))
        family.params.append(params[-1])
        family.numel += params[-1].padded_numel
        family.num_owned += len(shard)
        first_block += num_blocks(param.numel())
    return params


def plan(params: Sequence[TrainedParam], cap_bytes: int) -> list[Bucket]:
    """Group parameters into buckets of one family and at most ``cap_bytes``.

    A parameter larger than the cap gets a bucket of its own.

    Args:
        params: in the order in which their gradients get ready.

    Returns:
        Buckets in the order of the parameter that each waits for last; ``bucket_index`` of the parameters is set.
    """
    closed: list[list[int]] = []
    open_groups: dict[Family, list[int]] = {}
    open_bytes: dict[Family, int] = {}
    for position, trained in enumerate(params):
        family = trained.family
        if family in open_groups and open_bytes[family] + trained.grad_bytes > cap_bytes:
            closed.append(open_groups.pop(family))
            open_bytes[family] = 0
        open_groups.setdefault(family, []).append(position)
        open_bytes[family] = open_bytes.get(family, 0) + trained.grad_bytes
    buckets: list[Bucket] = []
    for group in sorted([*closed, *open_groups.values()], key=lambda group: group[-1]):
        members = [params[position] for position in group]
        for trained in members:
            trained.bucket_index = len(buckets)
        buckets.append(Bucket(members, sum(trained.padded_numel for trained in members)))
    return buckets
