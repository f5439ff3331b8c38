"""Names of communicators, since operators of torch.library take strings, and the workspace that goes with each.

A name lives as long as its communicator. The tables are the only state of a process that tensor parallelism has.
"""

from __future__ import annotations

import itertools
from weakref import WeakKeyDictionary, WeakValueDictionary

from pycomm.communicator import Communicator
from pycomm.tensor_parallel.cuda_products import CudaProducts
from pycomm.tensor_parallel.workspace import Workspace

__all__ = ["communicator", "cuda_products", "group_name", "workspace"]

_by_name: WeakValueDictionary[str, Communicator] = WeakValueDictionary()
_names: WeakKeyDictionary[Communicator, str] = WeakKeyDictionary()
_workspaces: WeakKeyDictionary[Communicator, Workspace] = WeakKeyDictionary()
_cuda_products: WeakKeyDictionary[Communicator, CudaProducts | None] = WeakKeyDictionary()
_numbers = itertools.count()


def group_name(comm: Communicator) -> str:
    """The string that operators of ``pycomm::`` know ``comm`` by, in this process."""
    name = _names.get(comm)
    if name is None:
        # Communicators of a process may have equal names, and torch may keep graphs that hold a string for long.
        name = _names[comm] = f"{comm.name}#{next(_numbers)}"
        _by_name[name] = comm
    return name


def communicator(name: str) -> Communicator:
    """The communicator of that name.

    Raises:
        ValueError: it is gone, or never was.
    """
    comm = _by_name.get(name)
    if comm is None:
        raise ValueError(f"no communicator has the name {name!r} any more: keep it while its layers are used")
    return comm


def workspace(comm: Communicator) -> Workspace:
    """What fused operations of ``comm`` share; made in the first of them, which is collective."""
    found = _workspaces.get(comm)
    if found is None:
        found = _workspaces[comm] = Workspace(comm)
    return found


def cuda_products(comm: Communicator) -> CudaProducts | None:
    """What fused products of ``comm`` on GPUs share; made in the first of them, which is collective.

    Returns:
        None: its ranks do not map each other's memory.
    """
    if not comm.capabilities.orders_on_device:
        return None
    if comm not in _cuda_products:
        _cuda_products[comm] = CudaProducts.connect(comm)
    return _cuda_products[comm]
