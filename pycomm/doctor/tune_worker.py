"""One rank of ``pycomm doctor --tune``: ``python -m pycomm.doctor.tune_worker STORE NUM_RANKS TIMEOUT_S PLAN RANK``.

PLAN is JSON: what to measure, with which thresholds, how often. Every contender is a communicator of its own in the
same processes; they take turns, one after the other, round by round. A turn is a few operations, each between a barrier
and the clock, with the buffers written anew before, as data really arrives. Prints one line a workload, for the
progress display, then this rank's times.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import FileStore, Store

from pycomm.backends.shm import ShmBackend
from pycomm.communicator import Communicator
from pycomm.rendezvous import Rendezvous

TURN_S = 0.002  # a turn is as many operations as fit, so that a clock's resolution and one interruption weigh little
MOST_OPERATIONS = 30


def communicator(store: Store, rank: int, num_ranks: int, timeout_s: float, thresholds: dict[str, int]) -> Communicator:
    with Rendezvous(store, rank, num_ranks, timeout_s) as rendezvous:
        return Communicator(ShmBackend.connect(rendezvous, "tune", False, thresholds), timeout_s)


def operation(
    comm: Communicator, workload: dict[str, Any], ordinary: torch.Tensor, received: torch.Tensor
) -> tuple[torch.Tensor, Callable[[], object]]:
    """The tensor to write before each operation, and the operation.

    Args:
        ordinary, received: of the workload's size; all contenders use them.
    """
    tensor = comm.empty(ordinary.numel()) if workload["memory"] == "symmetric" else ordinary
    if workload["call"] == "all_reduce":
        return tensor, lambda: comm.all_reduce(tensor)
    peer = comm.rank ^ 1
    if peer >= comm.world_size:  # an odd one out
        return tensor, lambda: None

    def there_and_back() -> None:
        if comm.rank < peer:
            comm.send(tensor, peer)
            comm.recv(received, peer)
        else:
            comm.recv(received, peer)
            comm.send(tensor, peer)

    return tensor, there_and_back


def turn(comm: Communicator, tensor: torch.Tensor, call: Callable[[], object], num_operations: int) -> float:
    """Seconds of one operation, the median of a turn."""
    times = []
    for number in range(num_operations):
        tensor.fill_(number)
        comm.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(contenders: list[Communicator], workload: dict[str, Any], num_rounds: int) -> list[list[float]]:
    """[contender][round] seconds. The first one is measured at the end of each round, too, against itself."""
    contenders = [*contenders, contenders[0]]
    buffers = torch.zeros(2, workload["bytes"] // 4)
    operations = [operation(comm, workload, *buffers) for comm in contenders]
    longest = torch.tensor(max(turn(c, *o, 3) for c, o in zip(contenders, operations, strict=True)))
    contenders[0].all_reduce(longest, "max")  # all ranks make the same number
    num_operations = max(3, min(MOST_OPERATIONS, int(TURN_S / longest.item())))
    times: list[list[float]] = [[] for _ in contenders]
    for number in range(num_rounds):
        order = list(range(len(contenders)))
        for index in order if number % 2 == 0 else reversed(order):  # what one leaves in the caches, another finds
            times[index].append(turn(contenders[index], *operations[index], num_operations))
    return times


def main() -> None:
    store_path, num_ranks, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    plan, rank = json.loads(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(1)
    store = FileStore(store_path, num_ranks)
    results = []
    for group in plan["groups"]:
        contenders = [communicator(store, rank, num_ranks, timeout_s, thresholds) for thresholds in group["thresholds"]]
        for workload in group["workloads"]:
            results.append(measure(contenders, workload, plan["rounds"]))
            if rank == 0:
                print(json.dumps({"done": len(results)}), flush=True)
        for comm in contenders:
            comm.barrier()
            comm.close()
    print(json.dumps({"times_s": results}))


if __name__ == "__main__":
    main()
