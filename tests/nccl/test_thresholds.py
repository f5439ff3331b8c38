"""The table that says which calls are pycomm's own kernels' and which NCCL's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pycomm import Communicator
from pycomm.backends.nccl.thresholds import Thresholds
from pycomm.backends.shm import tuning_here
from pycomm.doctor import gpu
from tests.nccl.helpers import run
from tests.pool import Pool


def test_routes() -> None:
    table = Thresholds(one_shot_bytes=100, two_shot_bytes=1000)
    sizes = (0, 100, 101, 1000, 1001)
    symmetric = ["one_shot", "one_shot", "two_shot", "two_shot", "nccl"]
    assert [table.route(n, symmetric=True) for n in sizes] == symmetric
    assert [table.route(n, symmetric=False) for n in sizes] == ["one_shot", "one_shot", "nccl", "nccl", "nccl"]


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Thresholds.of_this_process(4)
    monkeypatch.setenv("PYCOMM_TUNE", "gpu_one_shot_bytes=16K,slice_bytes=128K")
    table = Thresholds.of_this_process(4)
    assert table == Thresholds(16 << 10, default.two_shot_bytes)
    assert tuning_here(4)["slice_bytes"] == 128 << 10
    assert "4 ranks: one_shot up to 16 KiB; two_shot, in symmetric memory, up to" in gpu.own_kernels().detail
    monkeypatch.setenv("PYCOMM_TUNE", "gpu_three_shot_bytes=16K")
    with pytest.raises(ValueError, match="gpu_three_shot_bytes is no threshold; those of GPUs are gpu_one_shot_bytes"):
        Thresholds.of_this_process(4)
    assert gpu.own_kernels().status == "failed"


def agreed(comm: Communicator) -> Thresholds:
    part = comm.split(comm.rank)
    assert part is not None
    return comm._backend.thresholds  # type: ignore[attr-defined,no-any-return]


def with_a_wish(host: Communicator, rank: int) -> None:
    if host.rank == rank:
        os.environ["PYCOMM_TUNE"] += ",gpu_one_shot_bytes=77"


def without_it(host: Communicator) -> None:
    os.environ["PYCOMM_TUNE"] = os.environ["PYCOMM_TUNE"].replace(",gpu_one_shot_bytes=77", "")


@pytest.mark.parametrize(("rank", "counts"), [(0, True), (1, False)])
def test_rank_0_decides(pool: Pool, standin: Path, tmp_path: Path, rank: int, counts: bool) -> None:
    pool.run(2, with_a_wish, rank)
    tables = run(pool, 2, standin, tmp_path, agreed)
    pool.run(2, without_it)
    assert tables[0] == tables[1]
    assert (tables[0].one_shot_bytes == 77) is counts
