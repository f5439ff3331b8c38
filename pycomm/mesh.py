"""The ranks of a job as a box: data parallel x pipeline parallel x tensor parallel.

Each axis gives a rank a Communicator of the ranks that differ from it along that axis alone.
"""

from __future__ import annotations

from types import TracebackType

from pycomm.annotations import check_types
from pycomm.communicator import Communicator
from pycomm.errors import MismatchError

__all__ = ["Mesh"]


class Mesh:
    """``comm`` divided along three axes. Collective.

    Rank = (pp_rank * dp.world_size + dp_rank) * tp.world_size + tp_rank: tp varies fastest, since it talks most and
    neighbours are the closest; pp slowest, since it talks least.

    Args:
        comm: all ranks of the job.
        dp, pp, tp: ranks along each axis; their product is ``comm.world_size``.

    Attributes:
        comm: as given.
        dp, pp, tp: this rank's Communicator along each axis.
        dp_rank, pp_rank, tp_rank: its place there.

    Raises:
        ValueError: the product is another, or a number is below 1; no rank was asked.
        MismatchError: the ranks give different shapes.
    """

    @check_types()
    def __init__(self, comm: Communicator, dp: int = 1, pp: int = 1, tp: int = 1) -> None:
        if min(dp, pp, tp) < 1 or dp * pp * tp != comm.world_size:
            raise ValueError(
                f"Mesh(dp={dp}, pp={pp}, tp={tp}) has {dp * pp * tp} places for {comm.world_size} rank(s): each axis "
                "is at least 1, and the product is the number of ranks"
            )
        _check_same(comm, (dp, pp, tp))
        self.comm = comm
        self.tp_rank = comm.rank % tp
        self.dp_rank = comm.rank // tp % dp
        self.pp_rank = comm.rank // (tp * dp)
        # The colour is the place along the other two axes; ranks keep their order.
        self.dp = _split(comm, self.pp_rank * tp + self.tp_rank)
        self.pp = _split(comm, self.dp_rank * tp + self.tp_rank)
        self.tp = _split(comm, self.pp_rank * dp + self.dp_rank)

    def close(self) -> None:
        """Close the three communicators; ``comm`` stays open. Idempotent."""
        for group in (self.dp, self.pp, self.tp):
            group.close()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            for group in (self.dp, self.pp, self.tp):
                group.abort(f"{type(error).__name__}: {error}")
        self.close()

    def __repr__(self) -> str:
        sizes = f"dp={self.dp.world_size}, pp={self.pp.world_size}, tp={self.tp.world_size}"
        return f"Mesh({sizes}; this rank: dp {self.dp_rank}, pp {self.pp_rank}, tp {self.tp_rank})"


def _check_same(comm: Communicator, shape: tuple[int, int, int]) -> None:
    """Otherwise each split would succeed, with groups that nobody asked for."""
    calls = {rank: "Mesh(dp={}, pp={}, tp={})".format(*row) for rank, row in enumerate(comm.agree(shape))}
    if len(set(calls.values())) > 1:
        listing = "; ".join(f"rank {rank}: {call}" for rank, call in calls.items())
        raise MismatchError(f"the ranks arrange themselves differently: {listing}", calls=calls)


def _split(comm: Communicator, color: int) -> Communicator:
    group = comm.split(color)
    assert group is not None
    return group
