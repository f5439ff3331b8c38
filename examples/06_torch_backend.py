"""torch's own DDP and FSDP2 on pycomm: the one line that changes is the name of the back end.

On CPUs, or on GPUs where every rank has one:

torchrun --nproc-per-node 2 examples/06_torch_backend.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pycomm  # noqa: F401  (makes the back end known to torch)

ENOUGH_GPUS = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if ENOUGH_GPUS else torch.device("cpu")


def train(model: nn.Module) -> list[torch.Tensor]:
    """Five steps on data that differs by rank; the whole weights afterwards."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model(torch.randn(16, 8, generator=generator).to(DEVICE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).to(DEVICE)


dist.init_process_group("pycomm", device_id=DEVICE if ENOUGH_GPUS else None)
replicated = train(DistributedDataParallel(layers()))
sharded = layers()
fully_shard(sharded, mesh=init_device_mesh(DEVICE.type, (dist.get_world_size(),)))
difference = max((a - b).abs().max().item() for a, b in zip(replicated, train(sharded), strict=True))
everyone: list[float] = [0.0] * dist.get_world_size()
dist.all_gather_object(everyone, difference)
if dist.get_rank() == 0:
    print(
        f"DDP and FSDP2 on {dist.get_backend()}, {DEVICE.type}: weights differ by at most {max(everyone):.1e} "
        f"on {len(everyone)} ranks"
    )
dist.destroy_process_group()
