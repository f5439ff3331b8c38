"""Gradient buckets: few flat buffers that hold all gradients, so that few large messages travel instead of many small.

``plan`` decides who shares a bucket, from shapes and dtypes alone, so every rank decides the same without asking.
``build`` allocates the buffers and the views that become the parameters' ``.grad``.

Ref: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (2020), section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycomm.communicator import Communicator

ALIGN_BYTES = 64  # a cache line: no two parameters share one, and vector loads never straddle


@dataclass(eq=False)
class Slot:
    """A parameter's place in a bucket, and what is known of its gradient."""

    name: str
    param: nn.Parameter
    bucket_index: int
    view: Tensor  # shape, dtype and (where dense) strides of the parameter; memory of the bucket
    ready: bool = False  # the gradient of the running backward is in the view
    unreduced: bool = False  # the view holds gradients accumulated under no_sync()

    def adopt(self) -> None:
        """Make ``param.grad`` the view, with the value it has now.

        After ``zero_grad(set_to_none=True)`` autograd stores a fresh tensor in ``.grad``. Copying it here reads S and
        writes S bytes. The other way to get it into the bucket, zeroing the view before backward so that autograd
        accumulates into it, writes S, then reads 2 S and writes S; it would also turn -0.0 into 0.0.
        """
        grad = self.param.grad
        if grad is self.view:
            return
        assert grad is not None
        with torch.no_grad():
            self.view.copy_(grad)
        self.param.grad = self.view


@dataclass(eq=False)
class Bucket:
    """``flat``: [num_elements] of one dtype; every slot's view starts on a multiple of ALIGN_BYTES, gaps are zero."""

    flat: Tensor
    slots: list[Slot]
    num_pending: int = 0  # slots that are not ready in the running backward


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``tensor`` if it covers its memory without gaps (channels_last does), else of a dense copy."""
    return torch.empty_like(tensor, device="meta").stride()


def plan(params: Sequence[Tensor], cap_bytes: int) -> list[list[int]]:
    """Group parameters into buckets of one dtype and at most ``cap_bytes``, in the order in which they get ready.

    Backward reaches the last layers first, so parameters are taken in reverse. A parameter larger than the cap gets a
    bucket of its own.

    Returns:
        One list of positions in ``params`` per bucket, descending; buckets in order of the position they wait for last.
    """
    closed: list[list[int]] = []
    open_groups: dict[torch.dtype, list[int]] = {}
    open_bytes: dict[torch.dtype, int] = {}
    for position in reversed(range(len(params))):
        param = params[position]
        size = _padded_numel(param) * param.element_size()
        if param.dtype in open_groups and open_bytes[param.dtype] + size > cap_bytes:
            closed.append(open_groups.pop(param.dtype))
        group = open_groups.setdefault(param.dtype, [])
        open_bytes[param.dtype] = size + (open_bytes[param.dtype] if group else 0)
        group.append(position)
    return sorted([*closed, *open_groups.values()], key=lambda group: -group[-1])


def build(
    named: Sequence[tuple[str, nn.Parameter]], comm: Communicator, *, cap_bytes: int, symmetric: bool
) -> tuple[list[Bucket], Tensor]:
    """Allocate zeroed buckets for the named parameters. Collective where ``symmetric``.

    Returns:
        The buckets in launch order, and [world_size] zero elements at the end of the last one, one per rank, which the
        engine uses to tell peers that this rank's backward failed.
    """
    buckets: list[Bucket] = []
    groups = plan([param for _, param in named], cap_bytes)
    for index, group in enumerate(groups):
        members = [named[position] for position in group]
        starts = [0]
        for _, param in members:
            starts.append(starts[-1] + _padded_numel(param))
        is_last = index == len(groups) - 1
        flat = _allocate(starts[-1] + (comm.world_size if is_last else 0), members[0][1], comm, symmetric)
        slots = [
            Slot(name, param, index, torch.as_strided(flat, param.shape, dense_strides(param), start))
            for (name, param), start in zip(members, starts, strict=False)
        ]
        buckets.append(Bucket(flat, slots, num_pending=len(slots)))
    return buckets, buckets[-1].flat[starts[-1] :]


def _padded_numel(param: Tensor) -> int:
    """Elements that the parameter takes in a bucket: up to the next multiple of ALIGN_BYTES."""
    per_line = ALIGN_BYTES // param.element_size()
    return -(-param.numel() // per_line) * per_line


def _allocate(numel: int, like: Tensor, comm: Communicator, symmetric: bool) -> Tensor:
    """[numel, at least 1] zeros of the dtype and device of ``like``: a bucket of zero-sized parameters is sent too."""
    if not symmetric:
        return torch.zeros(max(1, numel), dtype=like.dtype, device=like.device)
    # Symmetric memory may be a reused segment: without zeroing, the gaps would carry old values, NaN perhaps.
    return comm.empty(max(1, numel), dtype=like.dtype).zero_()
