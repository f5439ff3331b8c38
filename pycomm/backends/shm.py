"""The host transport: ranks are processes of one host that share memory. No GPU, no files, no ports."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pycomm import _C, env
from pycomm.backends import Backend, Capabilities
from pycomm.rendezvous import Rendezvous

__all__ = ["Flag", "ShmBackend", "meet_on_this_host", "tuning_here"]

_OF_GPUS = "gpu_"  # thresholds that are not this back end's


class Flag:
    """How far each rank has come: a number in symmetric memory that only counts up. Made by Communicator.flag.

    Args:
        tensor: one int64.
        timeout_s: of a wait that names none.
    """

    def __init__(self, core: _C.HostCommunicator, tensor: torch.Tensor, timeout_s: float) -> None:
        self._tensor = tensor
        self._address = tensor.data_ptr()
        self._timeout_s = timeout_s
        self._post, self._wait = core.post, core.wait_posted

    def post(self, value: int) -> None:
        """Say that this rank has come to ``value``, not below the last one. Does not wait.

        What this rank wrote before is seen by whoever has waited for it.
        """
        self._post(self._address, value)

    def wait(self, value: int, *, rank: int | None = None, timeout_s: float | None = None) -> None:
        """Return once every rank, or ``rank`` alone, has posted ``value`` or more.

        Raises:
            PeerTimeoutError, PeerLostError: as a collective's.
            ValueError: there is no such rank, or ``timeout_s`` is not positive.
        """
        self._wait(self._address, value, rank, self._timeout_s if timeout_s is None else timeout_s)


class ShmBackend(Backend):
    """One rank's end of the host transport; see :class:`pycomm.backends.Backend`."""

    name = "shm"
    device = torch.device("cpu")

    def __init__(self, core: _C.HostCommunicator) -> None:
        self._core = core
        self.rank = core.rank
        self.world_size = core.world_size
        self.group = core.name
        self.tokens = core.tokens
        self.capabilities = Capabilities(has_flags=True, has_fused_step=core.world_size > 1)

    @classmethod
    def connect(
        cls, rendezvous: Rendezvous, name: str, strict: bool, thresholds: dict[str, int] | None = None
    ) -> ShmBackend:
        """Meet the other ranks, all of this host.

        Args:
            thresholds: in bytes, by name, in place of the defaults; rank 0's count. None: those of PYCOMM_TUNE.
        """
        thresholds = tuning_here(rendezvous.world_size) if thresholds is None else thresholds
        everyone = range(rendezvous.world_size)
        return cls(meet_on_this_host(rendezvous, everyone, name, strict, thresholds))

    def agree(self, row: bytes, timeout_s: float, kind: str = "agree", count: int | None = None) -> list[bytes]:
        return self._core.agree(row, kind, len(row) if count is None else count, timeout_s)

    def calls(self) -> _C.Calls:
        return _C.Calls(self._core)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, timeout_s: float) -> torch.Tensor:
        num_elements = 1
        for size in shape:
            num_elements *= size
        buffer = self._core.empty(num_elements * dtype.itemsize, timeout_s)
        return _view(buffer, num_elements, dtype).view(*shape)

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        num_bytes = tensor.numel() * tensor.element_size()
        return [
            _view(self._core.peer(tensor.data_ptr(), num_bytes, rank), tensor.numel(), tensor.dtype).view_as(tensor)
            for rank in range(self.world_size)
        ]

    def host(self) -> _C.HostCommunicator:
        return self._core

    def on_host(self, timeout_s: float) -> ShmBackend:
        """Itself."""
        return self

    def flag(self, tensor: torch.Tensor, timeout_s: float) -> Flag:
        if not self._core.is_symmetric(tensor.data_ptr(), tensor.element_size()):
            raise ValueError("flag is not symmetric memory: take one element of comm.empty(..., dtype=torch.int64)")
        return Flag(self._core, tensor, timeout_s)

    def split(self, color: int | None, key: int, timeout_s: float) -> ShmBackend | None:
        core = self._core.split(color, key, timeout_s)
        return None if core is None else ShmBackend(core)

    def synchronize(self, timeout_s: float) -> None:
        """Nothing is under way that no Work stands for."""

    def abort(self, reason: str) -> None:
        self._core.abort(reason)

    def close(self, drain_s: float) -> None:
        self._core.close(drain_s)


def meet_on_this_host(
    rendezvous: Rendezvous, ranks: Sequence[int], name: str, strict: bool, thresholds: dict[str, int]
) -> _C.HostCommunicator:
    """The first of ``ranks`` publishes a random socket address, the others come there."""
    leader, listener, address = ranks[0], None, ""
    if len(ranks) > 1 and rendezvous.rank == leader:
        listener = _C.Listener()
        rendezvous.put(f"shm/{leader}", listener.address)
    elif len(ranks) > 1:
        address = rendezvous.get(f"shm/{leader}", rank=leader, num_hex_digits=_C.ADDRESS_DIGITS)
    return _C.HostCommunicator(
        name,
        ranks.index(rendezvous.rank),
        len(ranks),
        listener,
        address,
        rendezvous.timeout_s,
        strict,
        thresholds,
        list(ranks),
        rendezvous.check,
    )


def tuning_here(world_size: int) -> dict[str, int]:
    """All thresholds that so many ranks use here, in bytes: the defaults, and those of PYCOMM_TUNE.

    Raises:
        ValueError: PYCOMM_TUNE names no threshold, or asks for a value that cannot be.
    """
    thresholds = {name: value for name, value in env.tune().items() if not name.startswith(_OF_GPUS)}
    try:
        return _C.tuning(world_size, thresholds)
    except ValueError as error:
        raise ValueError(f"PYCOMM_TUNE: {error}") from None


def _view(buffer: _C.SymmetricBuffer, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """The buffer's memory as a flat tensor that keeps the buffer alive."""
    if num_elements == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(buffer, dtype=torch.uint8, count=num_elements * dtype.itemsize).view(dtype)
