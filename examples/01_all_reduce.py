"""All-reduce on ordinary and symmetric tensors, synchronous and asynchronous, and a scan.

Run it with several processes, or alone (a world of one):

    torchrun --nproc-per-node 2 examples/01_all_reduce.py
    python examples/01_all_reduce.py
"""

import torch

import pycomm

with pycomm.init("host") as comm:
    # Any contiguous tensor works. Sums are taken in rank order, so every rank gets the same bits.
    tensor = torch.full((4,), float(comm.rank + 1))
    comm.all_reduce(tensor)
    print(f"rank {comm.rank}: sum over {comm.world_size} rank(s): {tensor.tolist()}")

    # Symmetric memory is mapped by every rank: nothing is staged, and peers' parts can be read directly.
    symmetric = comm.empty(1_000_000)
    symmetric.fill_(float(comm.rank))
    work = comm.all_reduce(symmetric, op="avg", async_op=True)
    busy = torch.randn(200, 200) @ torch.randn(200, 200)  # meanwhile
    work.wait()
    expected = (comm.world_size - 1) / 2
    assert (symmetric == expected).all()

    # Where do this rank's tokens begin among those of all? The sum up to this rank, without its own.
    num_tokens = torch.tensor([100 + comm.rank])
    ends = num_tokens.clone()
    comm.scan(ends)
    print(f"rank {comm.rank}: tokens {(ends - num_tokens).item()} to {ends.item() - 1}")

    comm.barrier()
    assert all((peer == expected).all() for peer in comm.peers(symmetric))
    comm.barrier()
