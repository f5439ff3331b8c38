"""pycomm: communication and parallelism for pretraining large language models.

One semantics on processes that share a host's memory, on one GPU and on a cluster. Start with :func:`pycomm.init`.
"""

import torch as _torch  # noqa: F401  (before the extension: it brings the C++ runtime that both use)

from pycomm import errors, pipeline, tensor_parallel
from pycomm._C import version as _version
from pycomm.communicator import Communicator, Work, init
from pycomm.data_parallel import DataParallel, ShardedAdamW, clip_grad_norm_
from pycomm.mesh import Mesh
from pycomm.torch_backend import register as _register_with_torch

__version__ = _version()
__all__ = [
    "Communicator",
    "DataParallel",
    "Mesh",
    "ShardedAdamW",
    "Work",
    "__version__",
    "clip_grad_norm_",
    "errors",
    "init",
    "pipeline",
    "tensor_parallel",
]

_register_with_torch()  # torch.distributed.init_process_group("pycomm") works from here on
