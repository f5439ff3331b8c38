"""pycomm's CUDA kernels on tensors, for tests and measurements and for whoever builds on them: the kernels of several
*virtual ranks* on one GPU, launched by one thread, or of one rank a process, over memory that all ranks map.

Needs a build with CUDA code (``PYCOMM_CUDA=ON``, or ``AUTO`` where there is a GPU); without one, or without a GPU,
making :class:`KernelRanks` raises :class:`pycomm.errors.BackendUnavailableError`.
"""

from pycomm.gpu.matmul import OverlappedMatmuls
from pycomm.gpu.ranks import Bucket, KernelRanks, kernel_device

__all__ = ["Bucket", "KernelRanks", "OverlappedMatmuls", "kernel_device"]
