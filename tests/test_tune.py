"""PYCOMM_TUNE sets the thresholds of all ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pycomm
from pycomm import Communicator, env
from pycomm.backends.shm import tuning_here
from tests.host.test_random_calls import run_program
from tests.pool import TIMEOUT_S, Pool, file_store


@pytest.mark.parametrize(
    ("text", "thresholds"),
    [
        ("", {}),
        (" , ", {}),
        ("slice_bytes=131072", {"slice_bytes": 131072}),
        (
            "slice_bytes=1M, eager_bytes = 16K ,one_shot_bytes=0",
            {"slice_bytes": 1 << 20, "eager_bytes": 16384, "one_shot_bytes": 0},
        ),
    ],
)
def test_tune_is_read(monkeypatch: pytest.MonkeyPatch, text: str, thresholds: dict[str, int]) -> None:
    monkeypatch.setenv("PYCOMM_TUNE", text)
    assert env.tune() == thresholds
    found = tuning_here(2)
    assert found.items() >= thresholds.items()
    assert found.keys() == {"slice_bytes", "one_shot_bytes", "cached_bytes", "eager_bytes", "stream_bytes"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slice_bytes", "'slice_bytes' does not read like slice_bytes=131072"),
        ("slice_bytes=-1", "'slice_bytes=-1' does not read like"),
        ("slice_bytes=1.5K", "does not read like"),
        ("eager_bytes=1K,eager_bytes=2K", "names eager_bytes twice"),
        (
            "slices=1",
            "there is no threshold 'slices'; it is one of slice_bytes, one_shot_bytes, cached_bytes, ",
        ),
        ("slice_bytes=1K", "PYCOMM_TUNE: slice_bytes=1024: it is from 32768 to 16777216 and a multiple of 64"),
        ("eager_bytes=100", "eager_bytes=100: it is from 0 to 1048576 and a multiple of 64"),
        ("one_shot_bytes=17000", "one_shot_bytes=17000: it is from 0 to 16384$"),
        ("stream_bytes=99999999999999999999999", "stream_bytes"),
    ],
)
def test_nonsense_is_an_error_that_says_what_would_do(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv("PYCOMM_TUNE", text)
    with pytest.raises(ValueError, match=message):
        pycomm.init()


def run_tuned(comm: Communicator, path: str, text: str, strict: bool) -> dict[str, int]:
    """Rank 0's thresholds count, whatever the others' say; groups that are split from the world have them, too."""
    os.environ["PYCOMM_TUNE"] = text if comm.rank == 0 else "slice_bytes=64K"
    try:
        tuned = pycomm.init(
            store=file_store(path, comm.world_size),
            rank=comm.rank,
            world_size=comm.world_size,
            timeout_s=TIMEOUT_S,
            strict=strict,
        )
    finally:
        del os.environ["PYCOMM_TUNE"]
    with tuned:
        run_program(tuned, list(range(70)))
        tuned.barrier()
        part = tuned.split(0)
        assert part is not None
        found: dict[str, int] = part._backend._core.tuning()  # type: ignore[attr-defined]
        part.close()
    return found


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "thresholds",
    [
        {"slice_bytes": 32768, "one_shot_bytes": 0, "cached_bytes": 0, "eager_bytes": 0, "stream_bytes": 4096},
        {"slice_bytes": 32768, "one_shot_bytes": 16384, "cached_bytes": 9999, "eager_bytes": 64, "stream_bytes": 4160},
        {
            "slice_bytes": 1 << 20,
            "one_shot_bytes": 16384,
            "cached_bytes": 1 << 30,
            "eager_bytes": 1 << 20,
            "stream_bytes": 1 << 24,
        },
    ],
)
def test_every_threshold_gives_the_same_bits(
    pool: Pool, tmp_path: Path, thresholds: dict[str, int], strict: bool
) -> None:
    text = ",".join(f"{name}={value}" for name, value in thresholds.items())
    assert pool.run(3, run_tuned, str(tmp_path / "store"), text, strict) == [thresholds] * 3
