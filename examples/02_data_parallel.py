"""Data parallel: every rank trains on its own rows, gradients are averaged, the replicas stay the same.

Run:
    python examples/02_data_parallel.py
    torchrun --nproc-per-node 2 examples/02_data_parallel.py
"""

import torch
from torch import nn

import pycomm

NUM_STEPS = 40
NUM_MICRO_BATCHES = 2
ROWS = 16  # of one micro-batch on one rank


def main() -> None:
    with pycomm.init() as comm:
        # Seeds differ on purpose: DataParallel gives every rank the parameters of rank 0.
        torch.manual_seed(comm.rank)
        model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        model.to(comm.device)  # a GPU where every rank has one, else the CPU
        ddp = pycomm.DataParallel(model, comm, bucket_mb=0.01)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        if comm.rank == 0:
            print(f"{comm.world_size} rank(s); buckets of {ddp.bucket_bytes} bytes")

        for step in range(1, NUM_STEPS + 1):
            optimizer.zero_grad()
            with ddp.no_sync():  # accumulate without communication ...
                for _ in range(NUM_MICRO_BATCHES - 1):
                    loss_of_new_rows(ddp).backward()
            loss = loss_of_new_rows(ddp)
            loss.backward()  # ... and average everything here; .grad is final when this returns
            optimizer.step()
            if step % 10 == 0:
                mean_loss = loss.detach() * NUM_MICRO_BATCHES
                comm.all_reduce(mean_loss, op="avg")
                if comm.rank == 0:
                    waited_ms = ddp.exposed_comm_s * 1e3
                    print(f"step {step:3d}  loss {mean_loss.item():.4f}  waited {waited_ms:.2f} ms for communication")

        say_whether_replicas_agree(ddp, comm)


def loss_of_new_rows(model: nn.Module) -> torch.Tensor:
    """Rows of this rank: y = tanh(sum of x). The generator was seeded by rank, so no two ranks see the same."""
    x = torch.randn(ROWS, 8, device=next(model.parameters()).device)
    return nn.functional.mse_loss(model(x), x.sum(dim=1, keepdim=True).tanh()) / NUM_MICRO_BATCHES


def say_whether_replicas_agree(model: nn.Module, comm: pycomm.Communicator) -> None:
    """Every weight's smallest and largest value over the ranks are the same exactly if the replicas are."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    smallest, largest = weights.clone(), weights.clone()
    comm.all_reduce(smallest, op="min")
    comm.all_reduce(largest, op="max")
    if not torch.equal(smallest, largest):
        raise SystemExit(f"rank {comm.rank}: the replicas differ by up to {(largest - smallest).max().item()}")
    if comm.rank == 0:
        print(f"replicas agree: {weights.numel()} weights are the same on {comm.world_size} rank(s)")


if __name__ == "__main__":
    main()
