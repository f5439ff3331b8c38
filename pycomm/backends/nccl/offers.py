"""What a rank brings to a choice of back end: whether NCCL can work on it, and on which GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pycomm import _C
from pycomm.backends.nccl.gpu import index_of_this_rank
from pycomm.backends.nccl.library import load_driver, load_nccl
from pycomm.errors import BackendUnavailableError

__all__ = ["Offer", "offer"]


@dataclass(frozen=True)
class Offer:
    """For all ranks to see.

    Attributes:
        version: of NCCL, such as "2.28.9"; empty if it was not found or not looked for.
        obstacle: why NCCL cannot work on this rank; empty if it can.
        gpu: the UUID of the GPU that this rank would use; empty if there is none.
    """

    version: str = ""
    obstacle: str = ""
    gpu: str = ""


def offer(*, asked_for: bool) -> Offer:
    """Look whether this process can use NCCL. Initialises the CUDA driver, where there is one.

    Args:
        asked_for: name everything that is missing. Else, of a machine or a torch without GPUs, that there is none:
            nothing is loaded that will not be used.
    """
    if not asked_for and torch.version.cuda is None:
        return Offer(obstacle="this torch is built without CUDA")
    obstacles, gpu, version = [], "", ""
    try:
        driver = load_driver()
    except BackendUnavailableError as error:
        obstacles.append(f"there is no GPU: {error}")
    else:
        if torch.version.cuda is None:
            obstacles.append(f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of it")
        elif not torch.cuda.is_available():
            obstacles.append("torch sees no GPU: look at CUDA_VISIBLE_DEVICES and nvidia-smi")
        else:
            gpu, missing = _own_gpu(driver)
            obstacles += [missing] if missing else []
    if asked_for or not obstacles:
        try:
            version = load_nccl().version
        except BackendUnavailableError as error:
            obstacles.append(f"{error}: pip install 'pycomm[cu13]' (or cu12, as torch's CUDA), or set PYCOMM_NCCL_SO")
    return Offer(version, "; ".join(obstacles), gpu)


def _own_gpu(driver: _C.CudaDriver) -> tuple[str, str]:
    """The UUID of this rank's GPU, and why it has none."""
    try:
        return driver.device_uuid(index_of_this_rank()), ""
    except ValueError as error:
        return "", str(error)
