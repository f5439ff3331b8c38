"""What the loss over a cut vocabulary allocates, beside gathering the logits and calling torch's cross-entropy.

``python benchmarks/cross_entropy.py [--ranks 4] [--vocab 250880] [--tokens 1024] [--json FILE]``

Every rank has its columns of the logits. Forward and backward are watched by torch's profiler, which sees every
allocation of torch; the table shows the most of all ranks. Both losses are compared first. benchmarks/README.md
derives the columns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp
from host import describe_host
from linux import die_with_parent
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pycomm
from pycomm.tensor_parallel import gather_from_ranks, shard_sizes, vocab_parallel_cross_entropy

MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One contender: the largest single allocation, and the most that was held at once, in bytes; on any rank."""

    bench: str
    contender: str
    ranks: int
    vocab: int
    tokens: int
    logits_bytes: int  # all columns of all tokens
    shard_bytes: int  # the largest rank's columns
    forward_largest_bytes: int
    forward_peak_bytes: int
    backward_largest_bytes: int
    backward_peak_bytes: int


def allocations(call: Callable[[], object]) -> tuple[object, int, int]:
    """What ``call`` returns; its largest allocation and the most it held at once, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    largest = held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        largest, peak = max(largest, event.nbytes()), max(peak, held)
    return result, largest, peak


def run(rank: int, options: argparse.Namespace, path: str, results: mp.SimpleQueue) -> None:
    """One rank: both contenders, one after the other."""
    die_with_parent()
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(path, options.ranks)
    comm = pycomm.init(backend="shm", store=store, rank=rank, world_size=options.ranks)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(options.vocab, (options.tokens,), generator=generator)
    widths = shard_sizes(options.vocab, options.ranks)
    logits = torch.randn(options.tokens, widths[rank], generator=generator.manual_seed(rank)).requires_grad_()

    def own() -> Tensor:
        return vocab_parallel_cross_entropy(logits, target, comm)

    def gathered() -> Tensor:
        return torch.nn.functional.cross_entropy(gather_from_ranks(logits, comm, -1, widths), target)

    losses, found = [], {}
    for name, loss_of in (("vocab_parallel_cross_entropy", own), ("gathered logits", gathered)):
        loss_of()  # workspaces and threads are there
        comm.barrier()
        loss, *forward = allocations(loss_of)
        assert isinstance(loss, Tensor)
        _, *backward = allocations(loss.backward)
        losses.append(loss.item())
        logits.grad = None
        most = torch.tensor([*forward, *backward])
        comm.all_reduce(most, op="max")
        found[name] = most.tolist()
    if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
        raise RuntimeError(f"the losses differ: {losses}")
    if rank == 0:
        results.put(found)
    comm.barrier()
    comm.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=250_880)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON lines, one a contender")
    options = parser.parse_args()
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run, (options, f"{folder}/store", results), nprocs=options.ranks, start_method="spawn")
    whole = options.tokens * options.vocab * 4
    shard = options.tokens * shard_sizes(options.vocab, options.ranks)[0] * 4
    rows = [
        Row("cross_entropy", name, options.ranks, options.vocab, options.tokens, whole, shard, *figures)
        for name, figures in results.get().items()
    ]
    print(
        f"{options.ranks} ranks, {options.tokens} tokens, vocabulary {options.vocab}, float32: "
        f"logits {whole / MIB:,.1f} MiB, a rank's part {shard / MIB:,.1f} MiB"
    )
    heads = ("forward largest", "forward peak", "backward largest", "backward peak")
    print(f"{'MiB':30}" + "".join(f"{head:>18}" for head in heads))
    for row in rows:
        figures = (
            row.forward_largest_bytes, row.forward_peak_bytes, row.backward_largest_bytes, row.backward_peak_bytes
        )  # fmt: skip
        print(f"{row.contender:30}" + "".join(f"{figure / MIB:18,.1f}" for figure in figures))
    if options.json is not None:
        host = describe_host()
        options.json.write_text("".join(json.dumps({**asdict(row), "host": host}) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
