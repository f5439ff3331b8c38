"""The operations of ``fused_host.py`` by collectives, for back ends whose ranks cannot read each other's memory.

One chunk; with ``overlap`` the rank's own product runs while the shards are gathered, and the caller's other work while
the reduction is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pycomm.communicator import Communicator, Work
from pycomm.tensor_parallel.products import Product, Visit, as_3d, multiply, nothing
from pycomm.tensor_parallel.shards import shard_sizes, start_of

__all__ = ["all_reduce", "gather", "reduce_scatter", "row_counts"]


def row_counts(comm: Communicator, rows: int) -> list[int]:
    """``rows`` of every rank: a collective of 8 bytes each."""
    if comm.world_size == 1:
        return [rows]
    counts = torch.empty(comm.world_size, dtype=torch.int64, device=comm.device)
    comm.all_gather(counts, torch.tensor([rows], dtype=torch.int64, device=comm.device))
    found: list[int] = counts.tolist()
    return found


def gather(
    comm: Communicator,
    shard: Tensor,
    sizes: Sequence[int] | None,
    overlap: bool,
    start: Callable[[Sequence[int]], Visit],
    rest: Callable[[Callable[[], None]], None] = lambda visit_others: visit_others(),
    *,
    found: Sequence[int] | None = None,
) -> None:
    """As ``fused_host.gather``. ``found``: the rows of every rank, where they have shown them already."""
    rank, num_ranks = comm.rank, comm.world_size
    batch, rows, width = shard.shape
    found = row_counts(comm, rows) if found is None else found
    if sizes is not None and list(found) != list(sizes):
        raise ValueError(f"the ranks have {list(found)} rows, expected {list(sizes)}: pass the sizes that they have")
    whole = shard.new_empty(batch * width * sum(found))
    parts = [batch * width * count for count in found]
    work = comm.all_gather(whole, shard.contiguous(), output_splits=parts, async_op=_hides(comm, overlap))
    visit = start(found)
    visit(rank, start_of(found, rank), shard)

    def visit_others() -> None:
        if work is not None:
            work.wait()
        for i in range(1, num_ranks):
            peer = (rank + i) % num_ranks
            theirs = whole[start_of(parts, peer) :][: parts[peer]].view(batch, found[peer], width)
            visit(peer, start_of(found, peer), theirs)

    rest(visit_others)


def reduce_scatter(
    comm: Communicator, product: Product, overlap: bool, meanwhile: Callable[[], None] = nothing
) -> Tensor:
    """As ``fused_host.reduce_scatter``."""
    x, weight_t, bias = product.of_rank(comm.rank)
    x_3d = as_3d(x)
    batch, rows, _ = x_3d.shape
    width = weight_t.shape[1]
    sizes = shard_sizes(rows, comm.world_size)
    parts = [batch * size * width for size in sizes]
    partial = x.new_empty(sum(parts))
    for owner, size in enumerate(sizes):
        row = start_of(sizes, owner)
        block = partial[start_of(parts, owner) :][: parts[owner]].view(batch, size, width)
        multiply(x_3d[:, row : row + size], weight_t, block, bias)
    out = x.new_empty(*x.shape[:-2], sizes[comm.rank], width)
    _finish(comm.reduce_scatter(out, partial, input_splits=parts, async_op=_hides(comm, overlap)), meanwhile)
    return out


def all_reduce(comm: Communicator, product: Product, overlap: bool, meanwhile: Callable[[], None] = nothing) -> Tensor:
    """As ``fused_host.all_reduce``."""
    x, weight_t, bias = product.of_rank(comm.rank)
    out = x.new_empty(*x.shape[:-1], weight_t.shape[1])
    multiply(as_3d(x), weight_t, as_3d(out), bias)
    _finish(comm.all_reduce(out, async_op=_hides(comm, overlap)), meanwhile)
    return out


def _hides(comm: Communicator, overlap: bool) -> bool:
    """Whether there is anything to hide."""
    return overlap and comm.world_size > 1


def _finish(work: Work | None, meanwhile: Callable[[], None]) -> None:
    meanwhile()
    if work is not None:
        work.wait()
