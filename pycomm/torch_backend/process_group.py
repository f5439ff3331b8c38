"""One process group of torch.distributed on one communicator; point-to-point messages, names and the group's life.

A Python ProcessGroup replaces torch's own, which would have a back end for each device inside: this one serves all its
devices itself, and answers questions about "its back end" with itself.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from pycomm import calls, communicator
from pycomm.torch_backend.collectives import Collectives, Tensors
from pycomm.torch_backend.functional import serve_functional_collectives
from pycomm.torch_backend.tensors import Finish, landing, source
from pycomm.torch_backend.work import PycommWork

__all__ = ["PycommProcessGroup"]


class PycommProcessGroup(Collectives):
    """See the module. Collective to make: the ranks of the group meet over ``store``.

    Args:
        store: the group's own.
        rank: in the group.
        world_size: of the group.
        timeout_s: of every wait for a peer, until :meth:`set_timeout`.
        name: torch's for the group.
    """

    # torch asks the back end of a device for these.
    supports_splitting = False
    supports_coalescing = False
    supports_time_estimate = False

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float, name: str) -> None:
        super().__init__(rank, world_size)  # type: ignore[call-arg]
        serve_functional_collectives()
        self._store = store
        self._names = {"group": name, "description": ""}
        self._timeout_s = timeout_s
        self._collected: list[PycommWork] | None = None  # between _start_coalescing and _end_coalescing
        self._comm = communicator.init(
            "host", timeout_s=timeout_s, store=store, rank=rank, world_size=world_size, name=f"torch.distributed {name}"
        )

    # Names. The camel-cased ones are what C++ looks for.

    def name(self) -> str:
        return "pycomm"

    getBackendName = _get_backend_name = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._names["group"]

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._names["group"] = name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._names["description"]

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._names["description"] = description

    _set_group_name = setGroupName
    _set_group_desc = setGroupDesc  # type: ignore[assignment]
    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    def get_group_store(self) -> dist.Store:
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(self._comm.device.type)]

    def _get_backend(self, device: torch.device) -> PycommProcessGroup:
        return self

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    # Point-to-point messages.

    def send(self, tensors: Tensors, dst: int, tag: int) -> PycommWork:
        (tensor,) = tensors
        return self._work(
            self._comm.send(source(tensor), dst, tag, async_op=True, timeout_s=self._timeout_s), [tensor], None
        )

    def recv(self, tensors: Tensors, src: int | None, tag: int) -> PycommWork:
        (tensor,) = tensors
        wire, finish = landing(tensor)
        started = self._comm.recv(wire, src, tag, async_op=True, timeout_s=self._timeout_s)
        assert isinstance(started, calls.Work)
        return self._work(started, [tensor], finish)

    def recv_anysource(self, tensors: Tensors, tag: int) -> PycommWork:
        return self.recv(tensors, None, tag)

    # Calls that are issued together.

    def _start_coalescing(self, device: torch.device) -> None:
        self._collected = []

    def _end_coalescing(self, device: torch.device) -> PycommWork:
        works, self._collected = self._collected or [], None
        return self._joined(works)

    def _work(self, started: calls.Work | None, outputs: Tensors, finish: Finish) -> PycommWork:
        if started is None and finish is not None:
            finish()
        work = PycommWork([], outputs) if started is None else PycommWork([started], outputs, finish)
        if self._collected is not None:
            self._collected.append(work)
        return work

    def _joined(self, works: list[PycommWork]) -> PycommWork:
        return PycommWork.joined(works)

    # Life.

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        raise NotImplementedError(
            "monitored_barrier is gloo's: with the back end pycomm every call names the ranks that are missing, "
            "so call barrier()"
        )

    def abort(self) -> None:
        self._comm.abort("the process group was aborted")
        self._comm.close()

    def shutdown(self) -> None:
        self._comm.close()
