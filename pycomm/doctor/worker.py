"""One rank of the self-test: ``python -m pycomm.doctor.worker STORE NUM_RANKS TIMEOUT_S RANK`` prints a JSON object."""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.distributed import FileStore

import pycomm
from pycomm.communicator import Communicator

COUNT = 10_007  # a prime: neither the ranks nor the vector width divide it
LARGE_BYTES = 16 << 20


def values(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """[COUNT], what ``rank`` puts in; every rank can compute every rank's."""
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(rank)).to(dtype)


def expected_sum(num_ranks: int, dtype: torch.dtype) -> torch.Tensor:
    """[COUNT], added in fp32 in rank order and rounded once (docs/determinism.md)."""
    total = values(0, dtype).float()
    for rank in range(1, num_ranks):
        total += values(rank, dtype).float()
    return total.to(dtype)


def wrong_results(comm: Communicator) -> list[str]:
    """Names of the checks whose result differs by a bit."""
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        symmetric = comm.empty(COUNT, dtype=dtype)
        for kind, tensor in (("symmetric", symmetric), ("ordinary", torch.empty(COUNT, dtype=dtype))):
            tensor.copy_(values(comm.rank, dtype))
            comm.all_reduce(tensor)
            if not torch.equal(tensor, expected_sum(comm.world_size, dtype)):
                wrong.append(f"all_reduce of {kind} {dtype}")
            tensor.copy_(values(comm.rank, dtype))
            comm.broadcast(tensor, root=comm.world_size - 1)
            if not torch.equal(tensor, values(comm.world_size - 1, dtype)):
                wrong.append(f"broadcast of {kind} {dtype}")
    return wrong


def median_seconds(comm: Communicator, operation: Callable[[], object], repeats: int) -> float:
    """Median of ``repeats`` runs after a tenth as many to warm up; the ranks start each together."""
    seconds = []
    for index in range(-(repeats // 10) - 1, repeats):
        comm.barrier()
        start = time.perf_counter()
        operation()
        if index >= 0:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    store_path, num_ranks, timeout_s, rank = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    store = FileStore(store_path, num_ranks)
    with pycomm.init("shm", timeout_s=timeout_s, store=store, rank=rank, world_size=num_ranks) as comm:
        wrong = wrong_results(comm)
        one, large = comm.empty(1), comm.empty(LARGE_BYTES // 4)
        one.zero_()
        large.zero_()
        latency_s = median_seconds(comm, lambda: comm.all_reduce(one), 300)
        large_s = median_seconds(comm, lambda: comm.all_reduce(large), 10)
        # Bus bandwidth, 2 (n-1)/n of what each rank's buffer holds, so that figures of other world sizes compare.
        moved_bytes = LARGE_BYTES * 2 * (num_ranks - 1) / num_ranks
        comm.barrier()
    print(json.dumps({"wrong": wrong, "latency_us": latency_s * 1e6, "bandwidth_gbps": moved_bytes / large_s / 1e9}))


if __name__ == "__main__":
    main()
