"""The two functional collectives that torch does not hand to a Python process group.

torch's C++ calls a Python group through the methods that its binding forwards. ``all_gather_single`` and
``_start_coalescing`` are not among them, but two operators of compiled code call them: ``all_gather_into_tensor_out``,
which bucketing of all-gathers emits, and ``batch_p2p_ops``, which ``batch_isend_irecv`` becomes. Kernels for CPU
and CUDA tensors, where torch has only those for every device, take the same calls to whichever group is named. They
return when they have waited for the operation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch._C import _distributed_c10d as c10d

from pycomm.torch_backend import NAME

__all__ = ["serve_functional_collectives"]


@functools.cache
def serve_functional_collectives() -> torch.library.Library:
    """Register the kernels, once a process; they last as long as what is returned."""
    library = torch.library.Library("_c10d_functional", "IMPL")
    for key in ("CPU", "CUDA"):
        library.impl("all_gather_into_tensor_out", _all_gather_into_tensor_out, key)
        library.impl("batch_p2p_ops", _batch_p2p_ops, key)
    return library


def _all_gather_into_tensor_out(
    input: torch.Tensor, group_size: int, group_name: str, *, out: torch.Tensor
) -> torch.Tensor:
    group = c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    group._allgather_base(out, input, c10d.AllgatherOptions()).wait()
    return out


def _batch_p2p_ops(
    names: Sequence[str], peers: Sequence[int], tags: Sequence[int], tensors: Sequence[torch.Tensor], group_name: str
) -> list[torch.Tensor]:
    group = c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    device = tensors[0].device
    coalesces = device.type != "cpu" or group.name() == NAME
    if coalesces:
        group._start_coalescing(device)
    works = [
        group.send([tensor], peer, tag) if name == "isend" else group.recv([tensor], peer, tag)
        for name, peer, tag, tensor in zip(names, peers, tags, tensors, strict=True)
    ]
    for work in [group._end_coalescing(device)] if coalesces else works:
        work.wait()
    return [tensor.new_empty(0) if name == "isend" else tensor for name, tensor in zip(names, tensors, strict=True)]
