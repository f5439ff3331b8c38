"""Up to which sizes pycomm's own kernels do a call, where NCCL could, too: one table, rank 0's on every rank.

Own kernels work only where every rank's memory is mapped by all. There the smallest all-reduces take one step (everyone
reads everyone), middle ones two, in symmetric memory, and the largest are NCCL's. The defaults are those of vLLM's
kernels of the same two kinds on H100, but that for two ranks one step ends at 8 MiB, since twice as much is staged.
pycomm's own are not measured yet (docs/gpu_results.md).

Ref: vLLM, csrc/custom_all_reduce.cuh and vllm/distributed/device_communicators/all_reduce_utils.py.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property

from pycomm import env
from pycomm.backends import Backend
from pycomm.backends.agreement import pack_numbers, unpack_numbers

__all__ = ["IN_SYMMETRIC", "Thresholds"]

_PREFIX = "gpu_"  # of their names in PYCOMM_TUNE
_MOST_BYTES = 1 << 30
_DEFAULTS = (  # up to so many ranks: one_shot_bytes, two_shot_bytes
    (2, 8 << 20, 64 << 20),
    (4, 512 << 10, 32 << 20),
    (6, 256 << 10, 512 << 10),
    (math.inf, 256 << 10, 256 << 10),
)

IN_SYMMETRIC = frozenset({"two_shot"})  # kernels that need every rank's tensor in symmetric memory


@dataclass(frozen=True)
class Thresholds:
    """Up to how many bytes of the tensor each kernel is taken; of several the first. Above all of them, NCCL.

    Attributes:
        one_shot_bytes: one step.
        two_shot_bytes: two steps.
    """

    one_shot_bytes: int
    two_shot_bytes: int

    @classmethod
    def of_this_process(cls, world_size: int) -> Thresholds:
        """The defaults for so many ranks, and what PYCOMM_TUNE sets.

        Raises:
            ValueError: PYCOMM_TUNE names no threshold, or asks for a value that cannot be.
        """
        chosen = next(cls(*sizes) for most_ranks, *sizes in _DEFAULTS if world_size <= most_ranks)
        names = [field.name for field in fields(cls)]
        for name, value in env.tune().items():
            if not name.startswith(_PREFIX):
                continue
            short = name.removeprefix(_PREFIX)
            if short not in names:
                known = ", ".join(_PREFIX + known for known in names)
                raise ValueError(f"PYCOMM_TUNE: {name} is no threshold; those of GPUs are {known}")
            if value > _MOST_BYTES:
                raise ValueError(f"PYCOMM_TUNE: {name}={value} is not in 0 … {_MOST_BYTES}")
            chosen = replace(chosen, **{short: value})
        return chosen

    @classmethod
    def agreed(cls, desk: Backend | None, world_size: int, timeout_s: float) -> Thresholds:
        """Rank 0's. Collective over ``desk``, a group of the same ranks on the host; None: a world of one."""
        mine = cls.of_this_process(world_size)
        if desk is None:
            return mine
        return cls(*unpack_numbers(desk.agree(pack_numbers(astuple(mine)), timeout_s)[0]))

    def route(self, num_bytes: int, *, symmetric: bool) -> str:
        """Which kernel does an all-reduce of ``num_bytes`` a rank, where ranks map each other's memory; or "nccl"."""
        for kernel, most_bytes in self._kernels:
            if num_bytes <= most_bytes and (symmetric or kernel not in IN_SYMMETRIC):
                return kernel
        return "nccl"

    @cached_property
    def _kernels(self) -> list[tuple[str, int]]:
        return [(field.name.removesuffix("_bytes"), getattr(self, field.name)) for field in fields(self)]

    def __str__(self) -> str:
        texts = [
            f"{kernel}{', in symmetric memory,' if kernel in IN_SYMMETRIC else ''} up to {most_bytes / 1024:g} KiB"
            for kernel, most_bytes in self._kernels
        ]
        return f"{'; '.join(texts)}; above, NCCL"
