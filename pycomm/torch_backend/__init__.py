"""The torch.distributed back end "pycomm": ``import pycomm; torch.distributed.init_process_group("pycomm")``.

DDP, FSDP2, DTensor, torch's pipelining, its checkpoints and everything else that is written against torch.distributed
then runs on pycomm's communicators, unchanged. docs/torch_backend.md says what differs from gloo.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from pycomm import _C

if TYPE_CHECKING:
    from torch._C import _distributed_c10d as c10d

__all__ = ["NAME", "register", "seconds_of"]

NAME = "pycomm"


def register() -> None:
    """Make the name known to torch; ``import pycomm`` does it. All else is imported with the first group."""
    if dist.is_available() and NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _process_group, extended_api=True, devices=["cpu", "cuda"])


def _process_group(
    options: c10d._DistributedBackendOptions, backend_options: c10d.Backend.Options | None
) -> dist.ProcessGroup:
    from pycomm.torch_backend.process_group import PycommProcessGroup

    if backend_options is not None:
        raise ValueError("init_process_group: leave pg_options out: the back end pycomm has none")
    return PycommProcessGroup.connect(
        options.store, options.group_rank, options.group_size, seconds_of(options.timeout), options.group_id
    )


def seconds_of(timeout: timedelta) -> float:
    """As a communicator takes them: torch's users say "for ever" by days that no clock can hold."""
    return min(timeout.total_seconds(), _C.LONGEST_TIMEOUT_S)
