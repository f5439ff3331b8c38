"""What the fused products of one communicator on NCCL share: mapped memory of all ranks' GPUs, and how they agree.

Before a product is enqueued its ranks show each other, over the host, what they call. So different calls raise
``MismatchError`` as on the host transport, a rank that does not come is named before anything waits for it on the
device, everyone's rows are known without a look at the GPU, and all ranks find together that the workspace has to grow.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.errors import PycommError
from pycomm.gpu import KernelRanks, OverlappedMatmuls, kernel_device
from pycomm.tensor_parallel.descriptors import GATHER, describe, dtype_code, same_calls

__all__ = ["CudaProducts", "Shown"]

_Result = TypeVar("_Result")
_log = logging.getLogger("pycomm")
_WORDS = 7
_DESCRIBED = 5  # of them, for `describe`
_ROWS = 3
_RELEASE_S = 1e-3


class Shown(NamedTuple):
    """What all ranks have called.

    Attributes:
        rows: by rank, of x.
        in_features, out_features: the most of any rank; 0: a rank has none, which is nothing for overlapped products.
    """

    rows: list[int]
    in_features: int
    out_features: int


class SideStream:
    """A stream for a product beside which the caller has other work for the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def behind_current(self) -> Iterator[None]:
        """It is current in the block, and starts behind what the current stream holds."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def rejoin(self) -> None:
        """What the current stream does from now on comes behind it."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Workspace(NamedTuple):
    matmuls: OverlappedMatmuls
    capacity: tuple[int, int, int, int]  # rows of all, most of one rank, features in, features out


class CudaProducts:
    """One rank's end. Making it, and growing its workspaces, is collective.

    Args:
        name: of the communicator, for errors.
        host: the same ranks on the host transport.
        ranks: the same ranks, and their mapped memory.
    """

    def __init__(self, name: str, host: Communicator, ranks: KernelRanks) -> None:
        self._name = name
        self.side = SideStream(ranks.device)
        self._host = host
        self._ranks = ranks
        self._workspaces: dict[torch.dtype, _Workspace] = {}

    @classmethod
    def connect(cls, comm: Communicator) -> CudaProducts | None:
        """Returns None, on all ranks alike, if their memory cannot be mapped; the log says why."""
        if comm.world_size == 1:
            return None
        host = comm.on_host()
        if host is None:
            _log.info("products of group %r: by collectives, since its ranks are on several hosts", comm.name)
            return None
        index = comm.device.index
        # First what can fail on one rank alone: mapping needs all ranks.
        if _all_or_none(comm, host, lambda: kernel_device(index)) is None:
            return None
        ranks = _all_or_none(comm, host, lambda: KernelRanks.processes(host, device=index))
        if ranks is None:
            return None
        products = cls(comm.name, host, ranks)
        alive = weakref.ref(products)

        def release() -> None:
            found = alive()
            if found is not None:
                found.release()

        comm.when_it_fails(release)
        return products

    def show(self, kind: int, x: Tensor, in_features: int, out_features: int) -> Shown:
        """Tell all ranks what this one calls, and hear what they call.

        Args:
            x: [B, S, …] of the call.

        Raises:
            MismatchError: something else than this rank; on every rank, and the communicator stays usable.
            PeerTimeoutError, PeerLostError: a rank did not come.
        """
        width = in_features if kind == GATHER else out_features
        mine = [kind, dtype_code(x), x.shape[0], x.shape[1], width, in_features, out_features]
        table = torch.empty(self._host.world_size, _WORDS, dtype=torch.int64, device="cpu")
        self._host.all_gather(table, torch.tensor(mine, device="cpu"))
        found: list[list[int]] = table.tolist()
        calls = [tuple(words[:_DESCRIBED]) for words in found]
        same_calls(self._name, calls, describe, ignore=_ROWS if kind == GATHER else None)
        features = [[words[place] for words in found] for place in (_DESCRIBED, _DESCRIBED + 1)]
        most = [max(counts) if min(counts) > 0 else 0 for counts in features]
        return Shown([words[_ROWS] for words in found], *most)

    def matmuls(self, dtype: torch.dtype, rows: Sequence[int], shown: Shown) -> OverlappedMatmuls | None:
        """Overlapped products for a call that all ranks have shown.

        Args:
            rows: of every rank's shard.

        Returns:
            None, on all ranks: a rank has no features.
        """
        if not (shown.in_features and shown.out_features):
            return None
        needed = (sum(rows), max(rows), shown.in_features, shown.out_features)
        found = self._workspaces.get(dtype)
        if found is not None and all(need <= have for need, have in zip(needed, found.capacity, strict=True)):
            return found.matmuls
        if found is not None:
            needed = tuple(map(max, needed, found.capacity))  # type: ignore[assignment]
            found.matmuls.synchronize(self._host.timeout_s)
            self._host.barrier()  # nobody reads this rank's old workspace any more
            del found
            del self._workspaces[dtype]
        total, most, in_features, out_features = needed
        largest = [min(most, max(total - most * rank, 0)) for rank in range(self._host.world_size)]
        made = OverlappedMatmuls(self._ranks, largest, in_features, out_features, dtype)
        self._workspaces[dtype] = _Workspace(made, needed)
        return made

    def release(self) -> None:
        """The group has failed: end what waits on the device for other ranks."""
        for workspace in list(self._workspaces.values()):
            with contextlib.suppress(PycommError):  # which says that they did not come
                workspace.matmuls.synchronize(_RELEASE_S)


def _all_or_none(comm: Communicator, host: Communicator, attempt: Callable[[], _Result]) -> _Result | None:
    """What ``attempt`` returns; None, on all ranks, if it failed on one."""
    result = None
    try:
        result = attempt()
    except (PycommError, ValueError) as error:
        _log.info("products of group %r: by collectives on all ranks: %s", comm.name, error)
    all_can = torch.tensor([result is not None], dtype=torch.uint8, device="cpu")
    host.all_reduce(all_can, "min")
    return result if all_can.item() else None
