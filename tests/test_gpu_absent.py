"""What pycomm's parts for GPUs do on a machine without one."""

import gc
import os
import weakref

import pytest
import torch

from pycomm import _C
from pycomm.errors import BackendUnavailableError
from pycomm.gpu import KernelRanks
from pycomm.gpu.memory import tensors_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: tests/gpu")


def test_virtual_ranks_say_what_is_missing():
    reason = "no CUDA code: install it with PYCOMM_CUDA=ON" if not _C.cuda_build() else "the CUDA kernels need a GPU"
    with pytest.raises(BackendUnavailableError, match=reason):
        KernelRanks.virtual(2)


def test_so_does_the_extension_itself():
    with pytest.raises(BackendUnavailableError, match=r"no CUDA code|no GPU that CUDA can use"):
        _C.GpuMemory.virtual_ranks(0, 2, 1024)


def test_parts_of_memory_are_tensors_that_keep_it():
    numbers = torch.arange(2 * 6, dtype=torch.int32).view(2, 6)
    memory = _C.GpuMemory.borrowed([row.data_ptr() for row in numbers], 6 * 4)
    alive = weakref.ref(memory)
    tensors = tensors_of(memory, torch.device("cpu"), (2, 2), torch.int32, 8)
    _C.dlpack(memory.part(0), 24, -1, memory)  # a capsule that nobody takes
    del memory
    tensors[1][1, 1] = 77
    assert [tensor.tolist() for tensor in tensors] == [[[2, 3], [4, 5]], [[8, 9], [10, 77]]]
    assert numbers[1, 5] == 77
    view = tensors[0][0]
    del tensors
    gc.collect()
    assert alive() is not None
    del view
    gc.collect()
    assert alive() is None


def exchanges_descriptors(comm):
    """What each rank reads from every rank's descriptor."""
    fd = os.memfd_create("test")
    os.write(fd, f"rank {comm.rank}".encode())
    fds = comm._host.exchange_fds(fd, 30.0)
    os.close(fd)
    texts = [os.pread(each, 100, 0).decode() for each in fds]
    for each in fds:
        os.close(each)
    return texts


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_gets_every_ranks_descriptor(pool, world_size):
    expected = [f"rank {rank}" for rank in range(world_size)]
    assert pool.run(world_size, exchanges_descriptors) == [expected] * world_size
