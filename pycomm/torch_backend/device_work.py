"""The Work of calls on CUDA tensors: enqueued when the call returns, over when the device is through with them.

As with torch's own NCCL group, waiting orders the current stream behind the call and does not hold up the host, unless
``wait`` has a timeout; and a future is set at once, its value ordered on the device. So an error is raised by ``wait``
or by the next call, not by the future of a call that had been enqueued before it was known.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch

from pycomm._C import Work
from pycomm.errors import PycommError
from pycomm.torch_backend.tensors import Finish
from pycomm.torch_backend.work import NO_TIMEOUT, PycommWork

__all__ = ["CudaStreams", "DeviceWork", "joined"]

_POLL_S = 50e-6


class CudaStreams:
    """Order between the streams that are current on ``device`` at different times."""

    def __init__(self, device: torch.device) -> None:
        self.devices: list[torch.device | str | int] = [device]
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Passed when what the current stream holds now is over."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def follow(self, mark: torch.cuda.Event) -> None:
        """What the current stream does from now on comes behind ``mark``."""
        torch.cuda.current_stream(self._device).wait_event(mark)


class DeviceWork(PycommWork):
    """See the module. ``finish`` is enqueued on the stream that is current where the Work is first waited for.

    Args:
        operations: empty, or filled before anybody waits: those of messages that are enqueued together.
        streams: of the device.
        source: of a receive.
    """

    def __init__(
        self,
        operations: Sequence[Work],
        outputs: list[torch.Tensor],
        finish: Finish,
        streams: CudaStreams,
        source: int = -1,
    ) -> None:
        super().__init__(operations, outputs, finish)
        self.streams = streams
        self._devices = streams.devices
        self._source = source
        self._mark: torch.cuda.Event | None = None  # behind what ran on a current stream

    @classmethod
    def of_current_stream(cls, outputs: list[torch.Tensor], streams: CudaStreams) -> DeviceWork:
        """Of a call that has been enqueued on the current stream, with all that belongs to it."""
        work = cls([], outputs, None, streams)
        work._mark = streams.mark()
        return work

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        """Order the current stream behind the call; with a timeout make the host wait, too."""
        deadline = time.monotonic() + timeout.total_seconds()
        super().wait(timeout)
        if self._mark is None:
            if not self.operations:
                raise PycommError("this message was never enqueued: the coalesced block that it is part of did not end")
            return True
        self.streams.follow(self._mark)
        while timeout > NO_TIMEOUT and not self._mark.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done on the device after {timeout.total_seconds():g} s; it goes on")
            time.sleep(_POLL_S)
        return True

    def is_completed(self) -> bool:
        return super().is_completed() and (self._mark is None or self._mark.query())

    def source_rank(self) -> int:
        return self._source

    _source_rank = source_rank

    def _finished(self) -> None:
        self._mark = self.streams.mark()

    def _resolve_in_time(self) -> None:
        self.resolve()  # the future's callbacks have streams of their own, which wait for the operations


def joined(works: Sequence[PycommWork]) -> PycommWork:
    """One Work that is over when all of them are: on the device, if one of them is."""

    def finish() -> None:
        for work in works:
            work.wait()

    operations = [operation for work in works for operation in work.operations]
    outputs = [output for work in works for output in work.outputs]
    streams = next((work.streams for work in works if isinstance(work, DeviceWork)), None)
    if streams is None:
        return PycommWork(operations, outputs, finish)
    return DeviceWork(operations, outputs, finish, streams)
