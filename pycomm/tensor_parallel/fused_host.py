"""Matrix products fused with communication on the host transport: ranks compute straight out of each other's memory.

Three algorithms, each one turn of the workspace (``workspace.py``):

``gather``          every rank shows its shard, and visits all shards where they lie: its own while the others arrive,
                    then rank + 1, rank + 2, …; nothing is gathered into one tensor.
``reduce_scatter``  every rank writes its partial product, chunk by chunk, those of its successors first; a chunk's
                    owner adds all ranks' partials in rank order.
``all_reduce``      the same with every rank as reader. Up to three ranks each add all partials themselves (one step);
                    more share the work: the owner of a part adds it in place, and all copy it (two steps).

With ``overlap`` a rank computes chunk k + 1, and what the caller has besides (``meanwhile``), before it waits for the
peers' chunk k. Without, the same pieces are computed in the same order, one after the other, so the bits are the same.
A core computes or communicates, never both: what is hidden is the wait for ranks that are late.

The sequence, dim −2, is what is cut. 16-bit partial sums are added in fp32 and rounded once.

Refs: "Breaking the Computation and Communication Abstraction Barrier in Distributed Machine Learning Workloads"
(CoCoNet, 2022); "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models"
(2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.tensor_parallel.chunks import num_chunks_of, scattered, whole
from pycomm.tensor_parallel.descriptors import ALL_REDUCE, GATHER, REDUCE_SCATTER, describe, dtype_code
from pycomm.tensor_parallel.groups import workspace
from pycomm.tensor_parallel.products import Product, Visit, add, as_3d, multiply, nothing
from pycomm.tensor_parallel.shards import shard_sizes, start_of
from pycomm.tensor_parallel.workspace import Turn

__all__ = ["all_reduce", "gather", "reduce_scatter"]

_MAX_ONE_STEP = 3  # ranks; beyond, reading n partials costs more than a second step


def gather(
    comm: Communicator,
    shard: Tensor,
    sizes: Sequence[int] | None,
    overlap: bool,
    start: Callable[[Sequence[int]], Visit],
    rest: Callable[[Callable[[], None]], None] = lambda visit_others: visit_others(),
) -> None:
    """Visit every rank's shard.

    Args:
        shard: [B, s, K], this rank's; s may differ between ranks.
        sizes: s of each rank; None: found out, on the assumption that all are equal.
        start: given the sizes, makes what is called as ``visit(rank, row, shard)`` for each shard, ``row`` being
            where it starts in the whole. Called again if the assumption was wrong.
        rest: given what visits the other ranks' shards, calls it; may run another fused operation around it.
    """
    rank, num_ranks = comm.rank, comm.world_size
    batch, rows, width = shard.shape
    assumed = list(sizes) if sizes is not None else [rows] * num_ranks
    turn = workspace(comm).begin(comm, describe, GATHER, dtype_code(shard), batch, rows, width)
    row_bytes = batch * width * shard.element_size()
    shown = turn.fits(rows * row_bytes)
    if shown:
        turn.view(rank, shard.shape, shard.dtype).copy_(shard)
        turn.post()
    visit: Visit | None = None
    if overlap:
        visit = start(assumed)
        visit(rank, start_of(assumed, rank), shard)
    found = [words[3] for words in turn.check_equal(ignore=3)]
    if sizes is not None and found != assumed:
        raise ValueError(f"the ranks have {found} rows, expected {assumed}: pass the sizes that they have")
    if not turn.fits(max(found) * row_bytes):
        turn.grow(max(found) * row_bytes)
        turn.view(rank, shard.shape, shard.dtype).copy_(shard)
        turn.post_until(3)  # 2 was of the old buffer, if this rank's shard fitted there
        turn.wait(3)
    else:
        turn.wait(2)
    if visit is None or found != assumed:
        visit = start(found)
        visit(rank, start_of(found, rank), shard)
    reader = visit

    def visit_others() -> None:
        for i in range(1, num_ranks):
            peer = (rank + i) % num_ranks
            theirs = turn.view(peer, (batch, found[peer], width), shard.dtype)
            reader(peer, start_of(found, peer), theirs)

    rest(visit_others)


def reduce_scatter(
    comm: Communicator, product: Product, overlap: bool, meanwhile: Callable[[], None] = nothing
) -> Tensor:
    """The product summed over ranks in rank order: this rank's rows.

    Args:
        product: of […, S, K] and [K, N].
        meanwhile: called once, while peers compute if ``overlap``, else at the end.

    Returns:
        […, s, N] with s this rank's part of S, by the rule of ``torch.chunk``.
    """
    x, weight_t, bias = product.of_rank(comm.rank)
    x_3d = as_3d(x)
    batch, rows, _ = x_3d.shape
    shape = (batch, rows, weight_t.shape[1])
    turn = workspace(comm).begin(comm, describe, REDUCE_SCATTER, dtype_code(x), *shape)
    num_bytes = math.prod(shape) * x.element_size()
    _reserve(turn, num_bytes)
    sizes = shard_sizes(rows, comm.world_size)
    num_chunks = num_chunks_of(num_bytes, max(sizes) if batch == 1 else batch)
    out = x.new_empty(*x.shape[:-2], sizes[comm.rank], shape[2])
    out_3d = as_3d(out)
    chunks = turn.layout(
        (REDUCE_SCATTER, x.dtype, shape, num_chunks), lambda: scattered(turn, comm, shape, x.dtype, num_chunks)
    )

    def compute(j: int) -> None:
        for place, block in chunks[j].products:
            multiply(x_3d[place], weight_t, block, bias)
        turn.post()

    def reduce(j: int) -> None:
        if j == 0:
            turn.check_equal()
        turn.wait(2 + j)
        add(chunks[j].parts, out_3d[chunks[j].place])

    _pipeline(num_chunks, [compute, reduce], overlap, meanwhile)
    return out


def all_reduce(comm: Communicator, product: Product, overlap: bool, meanwhile: Callable[[], None] = nothing) -> Tensor:
    """The product summed over ranks in rank order, with the bits of :func:`reduce_scatter`.

    Args:
        product: of […, K] and [K, N].
        meanwhile: as of :func:`reduce_scatter`.

    Returns:
        […, N].
    """
    x, weight_t, bias = product.of_rank(comm.rank)
    shape = (x.shape[:-1].numel(), weight_t.shape[1])
    turn = workspace(comm).begin(comm, describe, ALL_REDUCE, dtype_code(x), 1, *shape)
    num_bytes = math.prod(shape) * x.element_size()
    _reserve(turn, num_bytes)
    num_chunks = num_chunks_of(num_bytes, shape[0])
    flat = x.reshape(shape[0], x.shape[-1])
    out = x.new_empty(*x.shape[:-1], shape[1])
    flat_out = out.view(shape)
    chunks = turn.layout(
        (ALL_REDUCE, x.dtype, shape, num_chunks), lambda: whole(turn, comm, shape, x.dtype, num_chunks)
    )

    def compute(j: int) -> None:
        chunk = chunks[j]
        multiply(flat[chunk.rows].unsqueeze(0), weight_t, chunk.blocks[comm.rank].unsqueeze(0), bias)
        turn.post()

    def reduce(j: int) -> None:
        if j == 0:
            turn.check_equal()
        turn.wait(2 + j)
        add(chunks[j].blocks, flat_out[chunks[j].rows])

    def reduce_own_part(j: int) -> None:
        if j == 0:
            turn.check_equal()
        turn.wait(2 + j)
        # In place: only this rank reads this part, until the post below says that it is a sum.
        add(chunks[j].parts, chunks[j].parts[comm.rank])
        turn.post(flag=1)

    def collect(j: int) -> None:
        turn.wait(1 + j, flag=1)
        for place, total in chunks[j].sums:
            flat_out.view(-1)[place].copy_(total)

    stages = [compute, reduce] if comm.world_size <= _MAX_ONE_STEP else [compute, reduce_own_part, collect]
    _pipeline(num_chunks, stages, overlap, meanwhile)
    return out


def _pipeline(
    num_chunks: int, stages: Sequence[Callable[[int], None]], overlap: bool, meanwhile: Callable[[], None]
) -> None:
    """Run every stage on every chunk; with ``overlap`` stage i is i chunks behind the first."""
    if not overlap:
        for j in range(num_chunks):
            for stage in stages:
                stage(j)
        meanwhile()
        return
    for step in range(num_chunks + len(stages) - 1):
        if step == num_chunks:
            meanwhile()
        for i, stage in enumerate(stages):
            if 0 <= step - i < num_chunks:
                stage(step - i)


def _reserve(turn: Turn, num_bytes: int) -> None:
    if not turn.fits(num_bytes):
        turn.check_equal()  # then it fits nowhere, and all grow
        turn.grow(num_bytes)
