"""pycomm: communication and parallelism for pretraining large language models.

One semantics on processes that share a host's memory, on one GPU and on a cluster. Start with :func:`pycomm.init`.
"""

import torch as _torch  # noqa: F401  (before the extension: it brings the C++ runtime that both use)

from pycomm import errors, tensor_parallel
from pycomm._C import version as _version
from pycomm.communicator import Communicator, Work, init
from pycomm.data_parallel import DataParallel

__version__ = _version()
__all__ = ["Communicator", "DataParallel", "Work", "__version__", "errors", "init", "tensor_parallel"]
