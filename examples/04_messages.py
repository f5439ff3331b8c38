"""Point-to-point messages: a ring exchange in one batch, and a work queue from any source.

torchrun --nproc-per-node 3 examples/04_messages.py
python examples/04_messages.py
"""

import torch

import pycomm

with pycomm.init("host") as comm:
    # Everyone sends to the right and receives from the left. In one batch nobody has to mind whose turn it is.
    left, right = (comm.rank - 1) % comm.world_size, (comm.rank + 1) % comm.world_size
    mine, theirs = torch.full((100_000,), float(comm.rank)), torch.empty(100_000)
    with comm.batch() as batch:
        batch.send(mine, right)
        batch.recv(theirs, left)
    assert (theirs == left).all()
    print(f"rank {comm.rank}: received from rank {left}")

    # Rank 0 takes results in whatever order they come.
    if comm.rank == 0:
        result = torch.empty(1)
        for _ in range(1, comm.world_size):
            source = comm.recv(result, tag=1)
            print(f"rank 0: rank {source} has {result.item():g}")
    else:
        comm.send(torch.tensor([comm.rank**2.0]), 0, tag=1)
