r"""One script on one host or on several: which ranks share memory, and a sum over all.

torchrun --nproc-per-node 2 examples/07_several_hosts.py
torchrun --nnodes 2 --node-rank 0 --nproc-per-node 2 --master-addr ADDR --master-port 29500 \
    examples/07_several_hosts.py
python examples/07_several_hosts.py
"""

import os

import pycomm

with pycomm.init("host") as comm:
    total = comm.empty(1000)  # symmetric inside each host
    total.fill_(comm.rank + 1)
    comm.all_reduce(total)
    assert (total == comm.world_size * (comm.world_size + 1) / 2).all()

    # Inside a host ranks map each other's memory: split by host first. torchrun numbers the hosts.
    host = comm.split(int(os.environ.get("GROUP_RANK", "0")))
    mine = host.empty(1)
    mine.fill_(comm.rank)
    host.barrier()
    neighbours = [int(part.item()) for part in host.peers(mine)]
    host.barrier()  # a peer's memory is its own again
    print(f"rank {comm.rank}: {comm.backend}; the ranks of my host are {neighbours}, by {host.backend}")
