"""One process group of torch.distributed on one communicator; point-to-point messages, names and the group's life.

A Python ProcessGroup replaces torch's own, which would have a back end for each device inside: this one serves all its
devices itself, and answers questions about "its back end" with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from pycomm import _C
from pycomm.communicator import Communicator
from pycomm.torch_backend import NAME, seconds_of
from pycomm.torch_backend.collectives import Collectives, Tensors
from pycomm.torch_backend.communicators import Communicators
from pycomm.torch_backend.device_work import CudaStreams, DeviceWork, joined
from pycomm.torch_backend.functional import serve_functional_collectives
from pycomm.torch_backend.tensors import Finish, landing, source
from pycomm.torch_backend.together import MessagesTogether
from pycomm.torch_backend.work import PycommWork

__all__ = ["PycommProcessGroup"]


class PycommProcessGroup(Collectives):
    """See the module.

    Args:
        communicators: of the group's ranks.
        timeout_s: of every wait for a peer, until :meth:`set_timeout`.
        name: torch's for the group.
    """

    # torch asks the back end of a device for these.
    supports_splitting = True  # which makes it call eager_connect_single_device, too
    supports_coalescing = False
    supports_time_estimate = False
    options = None

    def __init__(self, communicators: Communicators, timeout_s: float, name: str) -> None:
        super().__init__(communicators.host.rank, communicators.host.world_size)  # type: ignore[call-arg]
        serve_functional_collectives()
        self._communicators = communicators
        self._names = {"group": name, "description": ""}
        self._timeout_s = timeout_s
        self._collected: list[PycommWork] | None = None  # between _start_coalescing and _end_coalescing
        self._messages = MessagesTogether(communicators.of)

    @classmethod
    def connect(cls, store: dist.Store, rank: int, world_size: int, timeout_s: float, name: str) -> PycommProcessGroup:
        """Collective: the ranks of the group meet over ``store``, its own."""
        named = f"torch.distributed {name}"
        return cls(Communicators.connect(store, rank, world_size, timeout_s, named), timeout_s, name)

    # Names. The camel-cased ones are what C++ looks for.

    def name(self) -> str:
        return NAME

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
        return self._communicators.store

    @property
    def _device_types(self) -> list[torch.device]:
        """The CPU first: where there are several, torch moves objects, and holds barriers, there."""
        names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        return [torch.device(name) for name in names]

    def _get_backend(self, device: torch.device) -> PycommProcessGroup:
        return self

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    # Point-to-point messages.

    def send(self, tensors: Tensors, dst: int, tag: int) -> PycommWork:
        (tensor,) = tensors
        comm = self._communicators.of(tensor)
        if comm.capabilities.orders_on_device:
            works = self._messages.add(comm, (True, source(tensor), dst, tag), self._timeout_s)
            return self._collect(DeviceWork(works, [tensor], None, CudaStreams(comm.device)))
        started = comm.send(source(tensor), dst, tag, async_op=True, timeout_s=self._timeout_s)
        return self._work(comm, started, [tensor], None)

    def recv(self, tensors: Tensors, src: int | None, tag: int) -> PycommWork:
        (tensor,) = tensors
        comm = self._communicators.of(tensor)
        wire, finish = landing(tensor)
        if comm.capabilities.orders_on_device:
            works = self._messages.add(comm, (False, wire, src, tag), self._timeout_s)
            return self._collect(
                DeviceWork(works, [tensor], finish, CudaStreams(comm.device), -1 if src is None else src)
            )
        started = comm.recv(wire, src, tag, async_op=True, timeout_s=self._timeout_s)
        assert isinstance(started, _C.Work)
        return self._work(comm, started, [tensor], finish)

    def recv_anysource(self, tensors: Tensors, tag: int) -> PycommWork:
        return self.recv(tensors, None, tag)

    # Calls that are issued together.

    def _start_coalescing(self, device: torch.device) -> None:
        self._collected = []
        self._messages.start()

    def _end_coalescing(self, device: torch.device) -> PycommWork:
        self._messages.end(self._timeout_s)
        works, self._collected = self._collected or [], None
        return self._joined(works)

    def _work(self, comm: Communicator, started: _C.Work | None, outputs: Tensors, finish: Finish) -> PycommWork:
        if started is None and finish is not None:
            finish()
        if comm.capabilities.orders_on_device:
            return self._collect(self._device_work(comm, started, outputs, finish))
        work = PycommWork([], outputs) if started is None else PycommWork([started], outputs, finish)
        return work if self._collected is None else self._collect(work)

    def _device_work(self, comm: Communicator, started: _C.Work | None, outputs: Tensors, finish: Finish) -> DeviceWork:
        streams = CudaStreams(comm.device)
        if started is None:
            return DeviceWork.of_current_stream(outputs, streams)
        return DeviceWork([started], outputs, finish, streams)

    def _collect(self, work: PycommWork) -> PycommWork:
        if self._collected is not None:
            self._collected.append(work)
        return work

    def _joined(self, works: list[PycommWork]) -> PycommWork:
        return joined(works)

    # Life.

    def eager_connect_single_device(self, device: torch.device) -> None:
        """Connect the GPUs now, and not in the first call: what torch asks for where it was given a ``device_id``."""
        self._communicators.on(device)
        self.bound_device_id = device

    def perform_nocolor_split(self, device: torch.device) -> None:
        """Of ranks that are not in a new group. Its members meet over the store, without them."""

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: object = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: object = None,
    ) -> PycommProcessGroup | None:
        """A group of ``ranks`` of this one, for those who are in it; collective in this group.

        Different ranks may name different groups that do not overlap.
        """
        if opts is not None:
            raise ValueError("split_group: leave pg_options out: the back end pycomm has none")
        is_member = self.rank() in ranks
        store = dist.PrefixStore(f"{group_name}/", self.get_group_store())
        place = list(ranks).index(self.rank()) if is_member else 0
        part = self._communicators.split(min(ranks) if is_member else None, place, store)
        if part is None:
            return None
        group = PycommProcessGroup(part, self._timeout_s if timeout is None else seconds_of(timeout), str(group_name))
        group.setGroupDesc(group_desc or "")
        return group

    def _set_sequence_number_for_group(self) -> None:
        """Communicators number their calls themselves."""

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = seconds_of(timeout)

    _set_default_timeout = set_timeout

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        raise NotImplementedError(
            "monitored_barrier is gloo's: with the back end pycomm every call names the ranks that are missing, "
            "so call barrier()"
        )

    def abort(self) -> None:
        self._communicators.abort("the process group was aborted")
        self._communicators.close()

    def shutdown(self) -> None:
        self._communicators.close()
