"""Gradient buckets: few large messages instead of many small ones.

``make_slots`` describes the parameters, ``plan`` decides who shares a bucket, from shapes, dtypes and an order, so
every rank decides the same without asking.

Ref: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2020), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pycomm.data_parallel.shards import Shard, num_blocks, owned

ALIGN_BYTES = 64  # a cache line: no two parameters share one, and vector loads never straddle


@dataclass(eq=False)
class Family:
    """Parameters of equal dtypes, in model order; they share buffers."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    slots: list[Slot] = field(default_factory=list)
    numel: int = 0  # padded
    num_owned: int = 0

    @property
    def has_master(self) -> bool:
        """16-bit parameters are updated in fp32, and those values are kept."""
        return self.param_dtype.itemsize == 2


@dataclass(eq=False)
class Slot:
    """A trainable parameter: its place in buffers, and what is known of its gradient."""

    index: int  # in model order
    name: str
    param: nn.Parameter
    family: Family
    start: int  # elements, in buffers of its family that keep the model's order
    first_block: int  # in the table of norms
    shard: Shard  # this rank's
    turn: int  # which rank has the first chunk: see owned()
    bucket_index: int = 0
    view: Tensor | None = None  # its gradient's memory in a bucket, with shape and strides of the parameter
    ready: bool = False  # the gradient of the running backward has arrived
    unreduced: bool = False  # gradients were accumulated under no_sync()

    @property
    def padded_numel(self) -> int:
        """Elements that it takes in a buffer: up to the next multiple of ALIGN_BYTES."""
        return padded(self.param.numel(), self.family)

    @property
    def grad_bytes(self) -> int:
        return self.padded_numel * self.family.grad_dtype.itemsize

    def view_in(self, flat: Tensor, start: int) -> Tensor:
        """The parameter's shape at element ``start`` of ``flat``."""
        return torch.as_strided(flat, self.param.shape, dense_strides(self.param), flat.storage_offset() + start)

    def in_memory_order(self, tensor: Tensor) -> Tensor:
        """[numel] elements of ``tensor``, which has the parameter's shape, in the order of the parameter's memory."""
        strides = dense_strides(self.param)
        if tensor.stride() != strides:
            tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
        return torch.as_strided(tensor, (tensor.numel(),), (1,))


@dataclass(eq=False)
class Bucket:
    """Gradients that travel together: [numel] elements of one family, in the order in which they get ready."""

    slots: list[Slot]
    numel: int
    num_pending: int = 0  # slots that are not ready in the running backward

    @property
    def family(self) -> Family:
        return self.slots[0].family

    @property
    def num_bytes(self) -> int:
        return self.numel * self.family.grad_dtype.itemsize

    def starts(self) -> list[int]:
        """Of each slot, from the bucket's start."""
        starts = [0]
        for slot in self.slots[:-1]:
            starts.append(starts[-1] + slot.padded_numel)
        return starts


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``tensor`` if it covers its memory without gaps (channels_last does), else of a dense copy."""
    return torch.empty_like(tensor, device="meta").stride()


def padded(numel: int, family: Family) -> int:
    """A multiple of ALIGN_BYTES in both dtypes of the family."""
    per_line = ALIGN_BYTES // min(family.param_dtype.itemsize, family.grad_dtype.itemsize)
    return -(-numel // per_line) * per_line


def make_slots(
    named: Sequence[tuple[str, nn.Parameter, torch.dtype]], rank: int, world_size: int
) -> tuple[list[Slot], list[Family]]:
    """Slots in model order, and the families they belong to.

    Args:
        named: name, parameter, dtype of its gradient.
    """
    slots: list[Slot] = []
    families: dict[tuple[torch.dtype, torch.dtype], Family] = {}
    first_block = 0
    for index, (name, param, grad_dtype) in enumerate(named):
        family = families.setdefault((param.dtype, grad_dtype), Family(param.dtype, grad_dtype))
        turn = getattr(param, "shard_turn", index)
        begin, end = owned(param.numel(), turn, rank, world_size)
        shard = Shard(begin, end, family.num_owned)
        slot = Slot(index, name, param, family, family.numel, first_block, shard, turn)
        family.slots.append(slot)
        family.numel += slot.padded_numel
        family.num_owned += len(shard)
        first_block += num_blocks(param.numel())
        slots.append(slot)
    return slots, list(families.values())


def plan(slots: Sequence[Slot], cap_bytes: int) -> list[Bucket]:
    """Group slots into buckets of one family and at most ``cap_bytes``.

    A parameter larger than the cap gets a bucket of its own.

    Args:
        slots: in the order in which their gradients get ready.

    Returns:
        Buckets in the order of the slot that each waits for last; ``bucket_index`` of the slots is set.
    """
    closed: list[list[int]] = []
    open_groups: dict[Family, list[int]] = {}
    open_bytes: dict[Family, int] = {}
    for position, slot in enumerate(slots):
        family = slot.family
        if family in open_groups and open_bytes[family] + slot.grad_bytes > cap_bytes:
            closed.append(open_groups.pop(family))
            open_bytes[family] = 0
        open_groups.setdefault(family, []).append(position)
        open_bytes[family] = open_bytes.get(family, 0) + slot.grad_bytes
    buckets: list[Bucket] = []
    for group in sorted([*closed, *open_groups.values()], key=lambda group: group[-1]):
        members = [slots[position] for position in group]
        for slot in members:
            slot.bucket_index = len(buckets)
        buckets.append(Bucket(members, sum(slot.padded_numel for slot in members), num_pending=len(members)))
    return buckets
