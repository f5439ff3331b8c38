"""pycomm.init(): every way for ranks to meet, and what it says when they cannot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pycomm
from pycomm import Communicator
from pycomm.errors import BackendUnavailableError, MismatchError, PeerTimeoutError, PycommError
from pycomm.records import Greeting
from tests.pool import Pool, file_store

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_variables(rank: int, world_size: int, port: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def run_ranks(script: str, world_size: int) -> list[str]:
    """Run ``script`` on ranks that have only the launch variables; returns what each printed."""
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        variables = launch_variables(rank, world_size, port)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(script)],
                env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, outputs
    return outputs


def test_alone_it_is_a_world_of_one() -> None:
    with pycomm.init() as comm:
        assert (comm.rank, comm.world_size, comm.backend, comm.device.type) == (0, 1, "shm", "cpu")
        tensor = torch.arange(10.0)
        comm.all_reduce(tensor, "avg")
        comm.broadcast(tensor)
        comm.barrier()
        assert torch.equal(tensor, torch.arange(10.0))


def test_from_launch_variables_twice_and_beside_torch_distributed() -> None:
    """Rank 0's store listens on MASTER_ADDR alone; later init() and init_process_group() share it."""
    outputs = run_ranks(
        """
        import datetime, os, torch, torch.distributed as dist, pycomm
        first = pycomm.init(timeout_s=60)
        second = pycomm.init(timeout_s=60)
        if first.rank == 0:
            port = f":{int(os.environ['MASTER_PORT']):04X}"
            lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}")]
            listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(port)]
            assert listening == ["0100007F" + port], listening
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
        third = pycomm.init(timeout_s=60)
        for comm in (first, second, third):
            tensor = torch.ones(1000)
            comm.all_reduce(tensor)
            assert (tensor == 2).all()
        tensor = torch.ones(4)
        dist.all_reduce(tensor)
        third.barrier()
        dist.destroy_process_group()
        print("ok", tensor[0].item())
        """,
        world_size=2,
    )
    assert all("ok 2.0" in output for output in outputs)


def test_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch, pycomm\n"
        "comm = pycomm.init()\n"
        "tensor = torch.full((5,), float(comm.rank + 1))\n"
        "comm.all_reduce(tensor)\n"
        "os.write(1, f'sum {tensor[0].item()}\\n'.encode())\n"  # one write: ranks share the pipe
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "--master-addr=127.0.0.1"]
    result = subprocess.run(
        [*command, f"--master-port={free_port()}", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("sum 6.0") == 3


def from_a_given_store(comm: Communicator, path: str) -> tuple[int, int]:
    store = file_store(path, comm.world_size)
    with pycomm.init(store=store, rank=comm.rank, world_size=comm.world_size) as other:
        other.barrier()
        return other.rank, other.world_size


def test_from_a_given_store(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(3, from_a_given_store, str(tmp_path / "store")) == [(0, 3), (1, 3), (2, 3)]


def greet_as(path: str, rank: int, **changes: object) -> None:
    """Put a greeting into the store that another build, version or launch would put there."""
    store = file_store(path, 2)
    greeting = replace(Greeting(2, "auto"), **changes)
    count = store.add(f"pycomm/none/0/inits/{rank}", 1)
    dist.PrefixStore(f"pycomm/none/0/{count}", store).set(f"greeting/{rank}", json.dumps(asdict(greeting)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "9.9.9"),
        ("build", "feed"),
        ("protocol", 99),
        ("world_size", 3),
        ("backend", "shm"),
        ("strict", True),
        ("nccl", "2.18.1"),
    ],
)
def test_ranks_that_differ_are_both_named(tmp_path: Path, field: str, value: object) -> None:
    path = str(tmp_path / "store")
    greet_as(path, 1, **{"backend": "host", field: value})
    mine = str(getattr(Greeting(2, "host"), field))
    with pytest.raises(MismatchError, match=f"rank 0 has {mine}, rank 1 has {value}") as caught:
        pycomm.init("host", store=file_store(path, 2), rank=0, world_size=2, timeout_s=10)
    assert caught.value.calls[1] == f"init({field}={value})"


def test_shared_memory_across_two_hosts_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    greet_as(path, 1, host="another boot", backend="shm")
    with pytest.raises(BackendUnavailableError, match="2 hosts"):
        pycomm.init("shm", store=file_store(path, 2), rank=0, world_size=2, timeout_s=10)


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    with pytest.raises(PeerTimeoutError, match="rank\\(s\\) 0, 2 of 3") as caught:
        pycomm.init(store=file_store(str(tmp_path / "store"), 3), rank=1, world_size=3, timeout_s=0.3)
    assert caught.value.missing_ranks == [0, 2]


def test_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK is not set"):
        pycomm.init()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="MASTER_ADDR is not set.*torchrun"):
        pycomm.init()
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK=2 is not below WORLD_SIZE=2"):
        pycomm.init()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ValueError, match="RANK='one' is not a whole number"):
        pycomm.init()


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in launch_variables(0, 2, port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PycommError, match=f"MASTER_PORT={port}.*choose a free port"):
            pycomm.init(timeout_s=2)


def test_wrong_arguments(tmp_path: Path) -> None:
    store = file_store(str(tmp_path / "store"), 2)
    with pytest.raises(ValueError, match="both rank and world_size"):
        pycomm.init(store=store, rank=0)
    with pytest.raises(ValueError, match="rank=2 is not in"):
        pycomm.init(store=store, rank=2, world_size=2)
    with pytest.raises(ValueError, match="a store needs rank"):
        pycomm.init(store=store)
    with pytest.raises(ValueError, match="world_size=2 needs a way"):
        pycomm.init(rank=0, world_size=2)
    with pytest.raises(ValueError, match="backend='mpi'"):
        pycomm.init(backend="mpi")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match=r"backend='nccl': there is no GPU.*\(rank 0\)"):
            pycomm.init(backend="nccl")
    for timeout_s in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout_s"):
            pycomm.init(timeout_s=timeout_s)
