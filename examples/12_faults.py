"""A rank dies in the middle of its work, and every survivor says which one, whoever it was waiting for.

Four processes are divided into two pairs in two ways, so that some survivors never share a group with the victim: they
wait for a rank that waits for it. The script starts its own processes:

    python examples/12_faults.py
"""

import multiprocessing
import os
import signal
import sys
import tempfile

import torch
import torch.distributed as dist

import pycomm

WORLD_SIZE, VICTIM = 4, 2


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    with pycomm.init("host", store=dist.FileStore(store, WORLD_SIZE), rank=rank, world_size=WORLD_SIZE) as comm:
        rows, columns = comm.split(rank // 2), comm.split(rank % 2)
        for step in range(1_000_000):
            if rank == VICTIM and step == 100:
                os.kill(os.getpid(), signal.SIGKILL)
            for group in (rows, columns):
                group.all_reduce(torch.ones(1000))


def report(rank: int, store: str) -> None:
    try:
        run_rank(rank, store)
    except pycomm.errors.PeerLostError as error:
        print(f"rank {rank}: {error}", flush=True)
        sys.exit(1)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=report, args=(rank, f"{folder}/store")) for rank in range(WORLD_SIZE)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    codes = [process.exitcode for process in ranks]
    assert codes == [-signal.SIGKILL if rank == VICTIM else 1 for rank in range(WORLD_SIZE)], codes
    print("one rank was killed, three said so; nothing is left")


if __name__ == "__main__":
    main()
