"""The GPU of this process: its context, and the stream that its torch code runs on now."""

from __future__ import annotations

import torch

from pycomm import _C, env
from pycomm.backends.nccl.library import load_driver

__all__ = ["Gpu"]


class Gpu:
    """What the back end needs of a device.

    Args:
        index: of the device, as torch counts them.
    """

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.driver = load_driver()
        self.core = _C.CudaDevice(self.driver, index)

    @classmethod
    def of_this_rank(cls) -> Gpu:
        """The device that the program has made current with ``torch.cuda.set_device``, else number LOCAL_RANK, which is
        made current.

        Raises:
            ValueError: there is no such device.
        """
        launched = env.launch()
        index = torch.cuda.current_device()
        if index == 0 and launched is not None and torch.cuda.device_count() > 1:
            index = launched.local_rank
            if index >= torch.cuda.device_count():
                raise ValueError(
                    f"LOCAL_RANK={index}, but torch sees {torch.cuda.device_count()} GPU(s): start as many ranks as "
                    f"there are, or choose a device with torch.cuda.set_device() before init()"
                )
            torch.cuda.set_device(index)
        return cls(index)

    def current_stream(self) -> int:
        """The driver's handle of torch's current stream on this device."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)
