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

Shapes are [B, S, width]: the sequence, dim 1, is what is cut. 16-bit partial sums are added in fp32 and rounded once.

Refs: "Breaking the Computation and Communication Abstraction Barrier in Distributed Machine Learning Workloads"
(CoCoNet, 2022); "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models"
(2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pycomm.communicator import Communicator
from pycomm.tensor_parallel.groups import workspace
from pycomm.tensor_parallel.products import Visit, multiply, nothing
from pycomm.tensor_parallel.shards import shard_sizes, start_of
from pycomm.tensor_parallel.workspace import Turn

__all__ = ["all_reduce", "gather", "reduce_scatter"]

_CHUNK_BYTES = 4 << 20  # of the whole product; smaller chunks cost the product more than waiting costs
_MAX_CHUNKS = 4
_MAX_ONE_STEP = 3  # ranks; beyond, reading n partials costs more than a second step
_GATHER, _REDUCE_SCATTER, _ALL_REDUCE = range(3)
_CALLS = ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def describe(words: Sequence[int]) -> str:
    """The call that a descriptor stands for."""
    kind, dtype, batch, rows, width = words
    return f"{_CALLS[kind]}({str(_DTYPES[dtype]).removeprefix('torch.')}[{batch}, {rows}, {width}])"


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
    turn = workspace(comm).begin(comm, describe, _GATHER, _dtype(shard), batch, rows, width)
    row_bytes = batch * width * shard.element_size()
    shown = turn.fits(rows * row_bytes)
    if shown:
        turn.view(shard.shape, shard.dtype).copy_(shard)
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
        turn.view(shard.shape, shard.dtype).copy_(shard)
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
            theirs = turn.peer_view(peer, (batch, found[peer], width), shard.dtype)
            reader(peer, start_of(found, peer), theirs)

    rest(visit_others)


def reduce_scatter(
    comm: Communicator, x: Tensor, weight_t: Tensor, overlap: bool, meanwhile: Callable[[], None] = nothing
) -> Tensor:
    """``x @ weight_t``, summed over ranks in rank order: this rank's rows.

    Args:
        x: [B, S, K], where K may differ between ranks.
        weight_t: [K, N], any strides.
        meanwhile: called once, while peers compute if ``overlap``, else at the end.

    Returns:
        [B, s, N] with s this rank's part of S, by the rule of ``torch.chunk``.
    """
    rank, num_ranks = comm.rank, comm.world_size
    batch, rows, _ = x.shape
    width = weight_t.shape[1]
    turn = workspace(comm).begin(comm, describe, _REDUCE_SCATTER, _dtype(x), batch, rows, width)
    _reserve(turn, batch * rows * width * x.element_size())
    mine = turn.view((batch * rows * width,), x.dtype)
    peers = [turn.peer_view(peer, (batch * rows * width,), x.dtype) for peer in range(num_ranks)]
    sizes = shard_sizes(rows, num_ranks)
    out = x.new_empty(batch, sizes[rank], width)
    # One sequence is cut along its rows, several are cut into groups of whole ones: either way pieces are contiguous.
    num_chunks = _num_chunks(batch * rows * width * x.element_size(), max(sizes) if batch == 1 else batch)
    pieces = [_cut(sizes[owner] if batch == 1 else batch, num_chunks) for owner in range(num_ranks)]
    starts: list[list[int]] = []
    offset = 0
    for j in range(num_chunks):
        starts.append([])
        for owner in range(num_ranks):
            starts[-1].append(offset)
            low, high = pieces[owner][j]
            offset += (high - low) * width * (1 if batch == 1 else sizes[owner])

    def part(tensor: Tensor, j: int, owner: int, first_row: int) -> Tensor:
        low, high = pieces[owner][j]
        if batch == 1:
            return tensor[:, first_row + low : first_row + high]
        return tensor[low:high, first_row : first_row + sizes[owner]]

    def compute(j: int) -> None:
        for i in range(num_ranks):
            owner = (rank + 1 + i) % num_ranks
            rows_of_owner = part(x, j, owner, start_of(sizes, owner))
            count = rows_of_owner.shape[0] * rows_of_owner.shape[1] * width
            block = mine[starts[j][owner] :][:count].view(*rows_of_owner.shape[:2], width)
            multiply(rows_of_owner, weight_t, block)
        turn.post()

    def reduce(j: int) -> None:
        if j == 0:
            turn.check_equal()
        turn.wait(2 + j)
        target = part(out, j, rank, 0)
        _add([peer[starts[j][rank] :][: target.numel()].view(target.shape) for peer in peers], target)

    _pipeline(num_chunks, [compute, reduce], overlap, meanwhile)
    return out


def all_reduce(
    comm: Communicator, x: Tensor, weight_t: Tensor, overlap: bool, meanwhile: Callable[[], None] = nothing
) -> Tensor:
    """``x @ weight_t``, summed over ranks in rank order.

    Args and bits as :func:`reduce_scatter`. Returns [B, S, N].
    """
    rank, num_ranks = comm.rank, comm.world_size
    batch, rows, depth = x.shape
    width = weight_t.shape[1]
    turn = workspace(comm).begin(comm, describe, _ALL_REDUCE, _dtype(x), batch, rows, width)
    _reserve(turn, batch * rows * width * x.element_size())
    shape = (batch * rows, width)
    flat = x.reshape(batch * rows, depth)
    mine = turn.view(shape, x.dtype)
    peers = [turn.peer_view(peer, shape, x.dtype) for peer in range(num_ranks)]
    out = x.new_empty(shape)
    pieces = _cut(batch * rows, _num_chunks(out.numel() * out.element_size(), batch * rows))

    def compute(j: int) -> None:
        low, high = pieces[j]
        torch.mm(flat[low:high], weight_t, out=mine[low:high])
        turn.post()

    def reduce(j: int) -> None:
        if j == 0:
            turn.check_equal()
        turn.wait(2 + j)
        low, high = pieces[j]
        _add([peer[low:high] for peer in peers], out[low:high])

    def reduce_own_part(j: int) -> None:
        if j == 0:
            turn.check_equal()
        turn.wait(2 + j)
        low, high = _flat_part(pieces[j], width, rank, num_ranks)
        # In place: only this rank reads this part, until the post below says that it is a sum.
        _add([peer.view(-1)[low:high] for peer in peers], mine.view(-1)[low:high])
        turn.post(flag=1)

    def collect(j: int) -> None:
        turn.wait(1 + j, flag=1)
        for peer in range(num_ranks):
            low, high = _flat_part(pieces[j], width, peer, num_ranks)
            out.view(-1)[low:high].copy_(peers[peer].view(-1)[low:high])

    stages = [compute, reduce] if num_ranks <= _MAX_ONE_STEP else [compute, reduce_own_part, collect]
    _pipeline(len(pieces), stages, overlap, meanwhile)
    return out.view(batch, rows, width)


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


def _add(parts: Sequence[Tensor], out: Tensor) -> None:
    """Sum in rank order, 16-bit floats in fp32. ``out`` may be one of the parts."""
    if len(parts) == 2 and out.dtype in (torch.float32, torch.float64):
        torch.add(parts[0], parts[1], out=out)
        return
    total = parts[0].to(torch.promote_types(out.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    out.copy_(total)


def _num_chunks(num_bytes: int, num_units: int) -> int:
    """A function of sizes that all ranks share, whether they overlap or not."""
    return max(1, min(num_bytes // _CHUNK_BYTES, _MAX_CHUNKS, num_units))


def _cut(total: int, num_pieces: int) -> list[tuple[int, int]]:
    bounds = [total * i // num_pieces for i in range(num_pieces + 1)]
    return list(pairwise(bounds))


def _flat_part(piece: tuple[int, int], width: int, rank: int, num_ranks: int) -> tuple[int, int]:
    low, high = piece
    sizes = shard_sizes((high - low) * width, num_ranks)
    start = low * width + start_of(sizes, rank)
    return start, start + sizes[rank]


def _dtype(tensor: Tensor) -> int:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"fused products take float32, float64, float16 and bfloat16, not {tensor.dtype}")
    return _DTYPES.index(tensor.dtype)
