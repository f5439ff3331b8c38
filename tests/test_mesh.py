"""Mesh: who shares an axis with whom, and what each axis sums over."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import pycomm
from pycomm import Communicator
from pycomm.errors import MismatchError
from tests.pool import Pool

SHAPES = {
    n: [shape for shape in product(range(1, n + 1), repeat=3) if shape[0] * shape[1] * shape[2] == n]
    for n in (1, 2, 3, 4)
}


def axes(comm: Communicator, shapes: list[tuple[int, int, int]]) -> list[dict[str, tuple[int, list[int]]]]:
    """Of each shape and axis: this rank's place, and the ranks that share the axis with it, in order."""
    found = []
    for dp, pp, tp in shapes:
        with pycomm.Mesh(comm, dp, pp, tp) as mesh:
            assert f"dp={dp}, pp={pp}, tp={tp}" in repr(mesh)
            axis = {}
            for name in ("dp", "pp", "tp"):
                group, place = getattr(mesh, name), getattr(mesh, f"{name}_rank")
                assert group.rank == place
                ranks = torch.empty(group.world_size, dtype=torch.int64)
                group.all_gather(ranks, torch.tensor([comm.rank]))
                axis[name] = (place, ranks.tolist())
            found.append(axis)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_tp_varies_fastest_then_dp_then_pp(pool: Pool, world_size: int) -> None:
    results = pool.run(world_size, axes, SHAPES[world_size])
    for rank, found in enumerate(results):
        for (dp, pp, tp), axis in zip(SHAPES[world_size], found, strict=True):
            # Written out by counting, not by the formula of the implementation.
            order = list(product(range(pp), range(dp), range(tp)))
            p, d, t = order[rank]
            assert axis == {
                "dp": (d, [order.index((p, other, t)) for other in range(dp)]),
                "pp": (p, [order.index((other, d, t)) for other in range(pp)]),
                "tp": (t, [order.index((p, d, other)) for other in range(tp)]),
            }


def wrong_shapes(comm: Communicator) -> None:
    for shape in ((comm.world_size + 1, 1, 1), (-1, -1, comm.world_size), (0, 1, 1)):
        with pytest.raises(ValueError, match=f"for {comm.world_size} rank"):
            pycomm.Mesh(comm, *shape)
    with pytest.raises(
        MismatchError, match=r"rank 0: Mesh\(dp=2, pp=1, tp=1\); rank 1: Mesh\(dp=1, pp=2, tp=1\)"
    ) as caught:
        pycomm.Mesh(comm, **{"dp" if comm.rank == 0 else "pp": comm.world_size})
    assert caught.value.calls[1] == "Mesh(dp=1, pp=2, tp=1)"
    with pycomm.Mesh(comm, tp=comm.world_size) as mesh:  # the communicator goes on
        mesh.tp.barrier()
    mesh.close()
    comm.barrier()


def test_wrong_shapes(pool: Pool) -> None:
    pool.run(2, wrong_shapes)


def leave_with_an_error(comm: Communicator) -> str:
    try:
        with pycomm.Mesh(comm, pp=2) as mesh:
            if comm.rank == 0:
                raise KeyError("on purpose")
            mesh.pp.barrier()
    except (KeyError, pycomm.errors.PeerLostError) as error:
        return str(error)
    return ""


def test_an_error_inside_reaches_the_peers(pool: Pool) -> None:
    _, message = pool.run(2, leave_with_an_error)
    assert "on purpose" in message
