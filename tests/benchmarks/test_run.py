"""The scripts as a user runs them: two ranks, tiny sizes, real processes."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from operations import COLLECTIVES

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
KEYS = (  # the contract with those who read the file
    {"bench", "backend", "op", "ranks", "dtype", "bytes", "time_us_p50", "time_us_p99"}
    | {"algbw_gbps", "busbw_gbps", "wrong", "bound_share"}
)


def _command(*flags, script="allreduce"):
    return [sys.executable, str(SCRIPTS / f"{script}.py"), "--ranks", "2", *flags]


def test_two_ranks_end_to_end(tmp_path):
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "picture.svg"
    done = subprocess.run(
        _command(
            *("--backends", "pycomm,pycomm-ordinary,gloo", "--sizes", "1K,5000", "--turns", "2", "--iters", "3"),
            *("--json", str(rows_file), "--plot", str(picture)),
        ),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    backends = ["pycomm", "pycomm-ordinary", "gloo", "bound"]
    assert [(row["bytes"], row["backend"]) for row in rows] == [(b, name) for b in (1024, 5000) for name in backends]
    for row in rows:
        assert set(row) >= KEYS
        assert (row["bench"], row["op"], row["ranks"], row["dtype"]) == ("allreduce", "all_reduce", 2, "float32")
        assert row["wrong"] == 0
        assert row["iterations"] == 6
        assert 0 < row["time_us_p50"] <= row["time_us_p99"]
        assert row["busbw_gbps"] == row["algbw_gbps"]  # 2(n-1)/n is 1 for two ranks
        assert row["bound_share"] > 0
    assert {"cpu", "cores", "kernel", "python", "torch", "versions"} <= set(rows[0]["host"])
    assert list(rows[0]["host"]["versions"]) == backends
    assert all("host" not in row for row in rows[1:])
    drawn = picture.read_text()
    assert all(label in drawn for label in ("pycomm, symmetric", "torch gloo", "bound: plain loop"))


UNBOUND = ("barrier", "scan")


@pytest.mark.parametrize(
    ("script", "operations", "sizes"),
    [
        ("collectives", COLLECTIVES, [1024, 5000]),  # 5,003 bytes are no whole number of elements for each of two ranks
        ("p2p", ("ping_pong", "send"), [8, 5000]),
    ],
)
def test_every_operation_on_two_ranks_is_right(tmp_path, script, operations, sizes):
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "picture.svg"
    done = subprocess.run(
        _command(
            *("--backends", "pycomm,pycomm-ordinary,gloo", "--sizes", f"{sizes[0]},5003", "--turns", "1"),
            *("--iters", "3", "--json", str(rows_file), "--plot", str(picture)),
            script=script,
        ),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    expected = []
    for op in operations:
        backends = ["pycomm", "pycomm-ordinary", *([] if op == "scan" else ["gloo"])]
        backends += [] if op in UNBOUND else ["bound"]
        expected += [(op, size, backend) for size in ([0] if op == "barrier" else sizes) for backend in backends]
    assert [(row["op"], row["bytes"], row["backend"]) for row in rows] == expected
    for row in rows:
        assert set(row) >= KEYS
        assert row["bench"] == script
        assert row["wrong"] == 0
        assert row["iterations"] == 3
        assert 0 < row["time_us_p50"] <= row["time_us_p99"]
        assert (row["bound_share"] is None) == (row["op"] in UNBOUND)
        factor = {"reduce_scatter": 0.5, "all_gather": 0.5, "all_to_all": 0.5, "gather": 0.5, "scatter": 0.5}
        # One multiplication by 1/2 or 1, which is exact.
        assert row["busbw_gbps"] == row["algbw_gbps"] * factor.get(row["op"], 1.0)
    drawn = picture.read_text()
    assert all(f"{op}: median time" in drawn for op in operations if op != "barrier")


def test_a_dtype_that_a_contender_lacks_is_said_to_be_missing_not_dropped(tmp_path):
    done = subprocess.run(
        _command("--backends", "mpich", "--sizes", "1K", "--dtype", "bfloat16", "--turns", "1", "--iters", "2"),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Installed here or not, the contender that was asked for is spoken of.
    assert "n/a: mpich: MPI has no datatype for bfloat16" in done.stdout or "mpich is not measured" in done.stdout


def _heed_interrupts():
    """A shell's background jobs ignore SIGINT, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_however_the_driver_ends_its_ranks_end_too(how):
    driver = subprocess.Popen(
        _command("--backends", "gloo", "--sizes", "1K", "--turns", "100000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_heed_interrupts,
    )  # fmt: skip
    try:
        for line in driver.stdout:
            if line.startswith("# allreduce"):  # the heads of the columns follow: all have started
                break
        ranks = psutil.Process(driver.pid).children(recursive=True)
        directories = list(Path("/dev/shm").glob(f"pycomm-bench-{driver.pid}-*"))
        assert len(ranks) >= 2
        driver.send_signal(how)
        driver.communicate(timeout=60)
    finally:
        driver.kill()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert driver.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how]
    left = [directory for directory in directories if directory.exists()]
    for directory in left:
        shutil.rmtree(directory)
    assert not left or how == signal.SIGKILL  # which leaves files for the next run to remove, but no process
