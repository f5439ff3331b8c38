"""Products with communication on a GPU that several processes share: results, gradients, bits with and without overlap.

Over NCCL, with a GPU a rank, where there are two.
"""

from __future__ import annotations

import pytest
import torch

import pycomm
from pycomm.tensor_parallel.products import products_of
from pycomm.tensor_parallel.products.cuda import CudaProducts
from tests.gpu.helpers import SharedGpu, nccl_of, needs_gpus
from tests.tensor_parallel import test_products

CHECKS = ["check_all_gather", "check_reduce", "check_copy"]


def every_case(host, name, store=None):
    if store is not None:
        with nccl_of(host, store) as comm, torch.device(comm.device):
            return isinstance(products_of(comm), CudaProducts) and test_products.every_case(comm, name)
    comm = SharedGpu(host)
    with torch.device(comm.device):
        assert isinstance(products_of(comm), CudaProducts)
        return test_products.every_case(comm, name)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", CHECKS)
def test_results_and_gradients_are_those_of_the_whole(pool, world, name):
    assert pool.run(world, every_case, name) == [True] * world


@needs_gpus(2)
@pytest.mark.parametrize("name", CHECKS)
def test_over_nccl(pool, name, tmp_path):
    assert pool.run(2, every_case, name, str(tmp_path / "store")) == [True] * 2


def bits(host, overlap):
    comm = SharedGpu(host)
    with torch.device(comm.device):
        return test_products.bits_of(comm, overlap)


def test_overlap_does_not_change_a_bit(pool):
    assert pool.run(2, bits, True) == pool.run(2, bits, False)


def layers(host):
    """A Megatron MLP with sequence parallelism in bfloat16, forward and backward, against the same in float32."""
    comm = SharedGpu(host)
    hidden, ffn, tokens = 64, 256, 96
    with torch.device(comm.device):
        torch.manual_seed(0)
        weights = [torch.randn(ffn, hidden) / 8, torch.randn(hidden, ffn) / 16]
        x = torch.randn(tokens, hidden)
        up, down = (w.chunk(2, dim)[comm.rank].bfloat16().requires_grad_() for dim, w in enumerate(weights))
        shard = x.chunk(2)[comm.rank].bfloat16().requires_grad_()
        middle = pycomm.tensor_parallel.all_gather_matmul(shard, up, comm)
        out = pycomm.tensor_parallel.matmul_reduce_scatter(torch.relu(middle), down, comm)
        out.float().square().sum().backward()
        whole = [t.bfloat16().float().requires_grad_() for t in (x, *weights)]
        wanted = torch.relu(whole[0] @ whole[1].T) @ whole[2].T
        wanted.square().sum().backward()
        parts = [wanted.chunk(2)[comm.rank], whole[0].grad.chunk(2)[comm.rank]]
        parts += [w.grad.chunk(2, dim)[comm.rank] for dim, w in enumerate(whole[1:])]
        found = [out, shard.grad, up.grad, down.grad]
        return [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, parts, strict=True)]


def test_a_layer_in_bfloat16(pool):
    """Each value is rounded to bfloat16 about eight times on its way, by 2**-9 of itself at most, in random
    directions: the norm of all differences stays below 8 * 2**-9 of the norm."""
    for errors in pool.run(2, layers):
        assert max(errors) < 8 * 2**-9, errors
