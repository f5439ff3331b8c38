"""The NCCL back end's own kernels on GPUs: by themselves over processes, and as all of it chooses them.

NCCL refuses two ranks on one GPU. Ranks that say that they are on different hosts (NCCL_HOSTID) may pass: an
experiment, skipped with NCCL's words where they do not.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import partial

import pytest
import torch

import pycomm
from pycomm import _C
from pycomm.backends.nccl.kernels import Kernels
from pycomm.backends.nccl.symmetric import Symmetric
from pycomm.backends.nccl.thresholds import Thresholds
from pycomm.errors import PeerTimeoutError, PycommError
from pycomm.gpu.memory import tensors_of
from tests.gpu.helpers import KERNEL_TIMEOUT_S
from tests.pool import TIMEOUT_S, file_store
from tests.processes import Ranks

ONE_SHOT = 1 << 20


def symmetric_of(comm, timeout_s):
    device = torch.device("cuda", torch.cuda.current_device())
    num = torch.cuda.get_device_properties(device).multi_processor_count
    allocate = partial(_C.GpuMemory.processes, comm._host, device.index, timeout_s=TIMEOUT_S)
    memory = allocate(bytes=Kernels.memory_bytes(ONE_SHOT, num))
    kernels = Kernels(memory, device, comm.rank, num, timeout_s)
    thresholds = Thresholds(ONE_SHOT, 64 << 20)
    tensors = lambda memory, shape, dtype, offset: tensors_of(memory, device, shape, dtype, offset)  # noqa: E731
    return Symmetric(comm.rank, kernels, thresholds, tensors), kernels, allocate


def kernels_over_processes(comm):
    symmetric, kernels, allocate = symmetric_of(comm, KERNEL_TIMEOUT_S)
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        count = 2 * ONE_SHOT // dtype.itemsize + 3
        tensor = symmetric.add(allocate(bytes=count * dtype.itemsize), (count,), dtype)
        tensor.fill_(comm.rank + 1)
        ordinary = torch.full((ONE_SHOT // dtype.itemsize,), comm.rank + 1, dtype=dtype, device="cuda")
        name = str(dtype).removeprefix("torch.")
        torch.cuda.synchronize()
        comm.barrier()
        for data in (tensor, ordinary, tensor[: ONE_SHOT // dtype.itemsize - 1], ordinary):
            call = symmetric.all_reduce(data.data_ptr(), data.numel(), dtype.itemsize, name, "sum")
            call.launch(torch.cuda.current_stream().cuda_stream)
            results.append("one" if call.one_shot else "two")
        kernels._group.wait(TIMEOUT_S)
        torch.cuda.synchronize()
        comm.barrier()
        peer = symmetric.peers(tensor)[(comm.rank + 1) % comm.world_size]
        results += [tensor[0].item(), tensor[-1].item(), ordinary.unique().item(), peer[-1].item(), peer.device.index]
        comm.barrier()
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_kernels_of_processes(pool, world):
    total = world * (world + 1) // 2
    expected = ["two", "one", "one", "one", total * world, total, total * world, total, 0] * 3
    assert pool.run(world, kernels_over_processes) == [expected] * world


def waits_in_vain(comm):
    symmetric, kernels, _ = symmetric_of(comm, 0.5)
    if comm.rank == 0:
        tensor = torch.ones(10, device="cuda")
        symmetric.all_reduce(tensor.data_ptr(), 10, 4, "float32", "sum").launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        with pytest.raises(PeerTimeoutError, match="waited for rank 1"):
            kernels._group.check()
        code, rank = struct.unpack_from("<Ii", ctypes.string_at(kernels.status, 20))
        assert (code, rank) == (1, 1)
    comm.barrier()


def test_the_status_names_who_did_not_come(pool):
    pool.run(2, waits_in_vain)


def all_of_it(host, connection, folder):
    """Values, and what the back end says of its kernels; or NCCL's words."""
    os.environ |= {"NCCL_HOSTID": f"rank{host.rank}", "NCCL_SOCKET_IFNAME": "lo"}
    n = host.world_size
    try:
        comm = pycomm.init(
            "nccl", store=file_store(f"{folder}/nccl", n), rank=host.rank, world_size=n, timeout_s=TIMEOUT_S
        )
        comm.barrier()
    except PycommError as error:
        return "refused", str(error)
    small = torch.full((1000,), comm.rank + 1.0, device=comm.device)
    symmetric = comm.empty(3 << 20)
    symmetric.fill_(comm.rank + 1.0)
    large = torch.full((3 << 20,), comm.rank + 1.0, device=comm.device)
    comm.all_reduce(small)
    work = comm.all_reduce(symmetric, async_op=True)
    comm.all_reduce(large)
    work.wait()
    comm.synchronize()
    comm.barrier()
    values = [tensor.unique().item() for tensor in (small, symmetric, large, *comm.peers(symmetric))]
    comm.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.all_reduce(small)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    comm.barrier()
    values.append(small.unique().item())
    kernels = comm._backend.own_kernels
    comm.close()
    return values, kernels


def test_the_whole_back_end_on_one_gpu(tmp_path):
    with Ranks(tmp_path, 2, partial(all_of_it, folder=str(tmp_path)), TIMEOUT_S) as group:
        results = group.results()
    if results[0][0] == "refused":
        pytest.skip(results[0][1])
    for values, kernels in results:
        assert kernels.startswith("all-reduces in one step")
        assert values == [3.0] * 5 + [12.0]


def test_auto_takes_the_gpu():
    with pycomm.init() as comm:
        assert (comm.backend, comm.device.type) == ("nccl", "cuda")
        tensor = torch.ones(5, device=comm.device)
        comm.all_reduce(tensor)
        comm.synchronize()
        assert tensor.tolist() == [1.0] * 5
    with pycomm.init("host") as comm:
        assert comm.device.type == "cpu"
