"""What launchers say of a process: mpirun's and srun's variables, as they set them, without either being here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pycomm
from pycomm import env
from tests.test_meeting import Rank

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-somewhere-14518@1",
    "PMIX_RANK": "1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[07-08],login",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
SALLOC_SHELL = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "MPI_", "SLURM_", "MASTER_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


def launched(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> env.Launch | None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return env.launch()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (OPEN_MPI, (1, 2, 1, 2, "127.0.0.1")),
        (MPICH, (1, 2, 1, 2, "127.0.0.1")),
        (SRUN, (3, 4, 1, 2, "node07")),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}, (3, 4, 1, 4, "127.0.0.1")),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1"}, (3, 4, 1, 2, "10.0.0.1")),
        ({**SRUN, **OPEN_MPI}, (1, 2, 1, 2, "127.0.0.1")),  # srun has started mpirun's daemons
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (BATCH_SCRIPT, None),
        (SALLOC_SHELL, None),
    ],
)
def test_tasks_of_mpirun_and_srun(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[Any, ...] | None
) -> None:
    found = launched(monkeypatch, variables)
    if expected is None or found is None:
        assert found is None is expected
        return
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size, found.master_addr) == expected
    assert 20000 <= found.master_port < 30000
    assert found.job
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert launched(monkeypatch, {}) != found
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (launched(monkeypatch, {}) or found).world_size == 1  # torchrun's names come first


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "set MASTER_ADDR to the host of number 0"),
        ({**MPICH, "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "a"}, "set MASTER_PORT to one free port"),
        ({**MPICH, "PMI_RANK": "2"}, "PMI_RANK=2 is not below PMI_SIZE=2"),
        ({**MPICH, "PMI_RANK": "x"}, "PMI_RANK='x' is not a whole number"),
        ({**MPICH, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
        ({"PMIX_RANK": "3"}, "PMIX_RANK=3.*set RANK, WORLD_SIZE"),
    ],
)
def test_what_is_not_known_is_asked_for(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        launched(monkeypatch, variables)


def test_a_batch_script_is_told_that_it_is_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in BATCH_SCRIPT.items():
        monkeypatch.setenv(name, value)
    with pycomm.init() as comm:
        assert comm.world_size == 1
    assert "SLURM_NTASKS=4" in caplog.text
    assert "start it with srun" in caplog.text


def sum_of(variables: dict[str, str]) -> float:
    os.environ.update(variables)
    with pycomm.init(timeout_s=60) as comm:
        tensor = torch.full((2,), float(comm.rank + 1))
        comm.all_reduce(tensor)
        return float(tensor[0])


def test_two_tasks_of_mpirun_meet(tmp_path: Path) -> None:
    """They were two worlds of one, each with the right sum of itself."""
    names = {"PMIX_NAMESPACE": f"prterun-{tmp_path}"}
    ranks = [Rank(sum_of, {**OPEN_MPI, **names, "OMPI_COMM_WORLD_RANK": str(rank)}) for rank in range(2)]
    assert [rank.outcome()[0] for rank in ranks] == [3.0, 3.0]


def test_another_process_says_what_it_was_launched_with() -> None:
    """By /proc, and nothing of what it has set since."""
    code = "import os, sys; os.environ['RANK'] = '0'; print(flush=True); sys.stdin.read()"
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "5"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = env.launch_of(process.pid)
        assert found is not None
        assert (found.rank, found.where) == (1, "MASTER_ADDR=h MASTER_PORT=5")
        process.kill()
    assert env.launch_of(process.pid) is None
