"""Optimizer states (and gradients) divided over the ranks: less memory a rank, the same weights to the bit.

Run:
    python examples/11_sharded_optimizer.py
    torchrun --nproc-per-node 2 examples/11_sharded_optimizer.py
"""

import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import pycomm

NUM_STEPS = 20
ROWS = 16  # of one rank's batch


def main() -> None:
    with pycomm.init("host") as comm:
        weights = {}
        for stage in (0, 1, 2):
            ddp, optimizer = train(comm, stage)
            weights[stage] = torch.cat([p.detach().flatten() for p in ddp.parameters()])
            if comm.rank == 0:
                parameters = weights[stage].numel() * 4
                print(
                    f"stage {stage}: {parameters:,} bytes of parameters, {ddp.gradient_bytes:,} of gradients, "
                    f"{optimizer.state_bytes:,} of optimizer states a rank"
                )
        if not (torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])):
            raise SystemExit(f"rank {comm.rank}: the stages differ")
        if comm.rank == 0:
            print(f"the {weights[0].numel():,} weights are the same bits in all stages")
        save_and_load(comm, ddp, optimizer)


def train(
    comm: pycomm.Communicator, stage: int, num_steps: int = NUM_STEPS
) -> tuple[pycomm.DataParallel, pycomm.ShardedAdamW]:
    generator = torch.Generator().manual_seed(comm.rank)  # every rank has its own rows
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))
    ddp = pycomm.DataParallel(model, comm)
    optimizer = pycomm.ShardedAdamW(ddp, lr=1e-3, stage=stage)
    for _ in range(num_steps):
        x = torch.randn(ROWS, 64, generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x), x.sum(dim=1, keepdim=True).tanh()).backward()
        pycomm.clip_grad_norm_(ddp, 1.0)  # torch.nn.utils' needs whole gradients, and raises
        optimizer.step()
    return ddp, optimizer


def save_and_load(comm: pycomm.Communicator, ddp: pycomm.DataParallel, optimizer: pycomm.ShardedAdamW) -> None:
    """Every rank writes its own states; another number of ranks could read them, in any stage."""
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if comm.world_size == 1 else {}
    dist.init_process_group("pycomm", **alone)  # the checkpoint's ranks talk over it
    folder = [tempfile.mkdtemp(prefix="pycomm-example-") if comm.rank == 0 else None]
    dist.broadcast_object_list(folder)
    dcp.save({"model": ddp.state_dict(), "optimizer": optimizer.sharded_states()}, checkpoint_id=folder[0])

    fresh, fresh_optimizer = train(comm, stage=1, num_steps=0)
    model = fresh.state_dict()
    dcp.load({"model": model, "optimizer": fresh_optimizer.sharded_states()}, checkpoint_id=folder[0])
    fresh.load_state_dict(model)
    if comm.rank == 0:
        print(f"stage 2 saved, stage 1 loaded: it goes on after step {fresh_optimizer.num_steps}")
        shutil.rmtree(folder[0])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
