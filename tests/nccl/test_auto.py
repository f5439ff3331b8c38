"""What "auto" chooses of what the ranks bring: NCCL where each of them can use it on a GPU of its own."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pycomm
from pycomm import _C, Communicator, doctor
from pycomm.backends import choose
from pycomm.backends.nccl import Offer, offer
from pycomm.backends.nccl.gpu import Gpu
from pycomm.errors import BackendUnavailableError
from tests.nccl.helpers import standing_in
from tests.pool import TIMEOUT_S, Pool, file_store

ABSENT = "there is no GPU"


@pytest.mark.parametrize(
    ("hosts", "obstacles", "gpus", "name", "reason"),
    [
        ("aa", ["", ""], ["0", "1"], "nccl", "each of the 2 rank(s) has a GPU of its own"),
        ("a", [""], ["0"], "nccl", "each of the 1 rank(s) has a GPU of its own"),
        ("ab", ["", ""], ["0", "0"], "nccl", "each of the 2 rank(s) has a GPU of its own"),
        ("aa", ["", ""], ["0", "0"], "shm", "share this host's memory; not nccl: ranks 0, 1 share a GPU"),
        ("aab", ["", "", ""], ["0", "0", "0"], "gloo+shm", "gloo between them; not nccl: ranks 0, 1 share a GPU"),
        ("aa", ["", ABSENT], ["0", ""], "shm", f"this host's memory; not nccl: {ABSENT} (rank 1)"),
        ("aa", ["no NCCL", "no NCCL"], ["0", "1"], "shm", "this host's memory; not nccl: no NCCL (rank 0, 1)"),
        ("aa", [ABSENT, ABSENT], ["", ""], "shm", "all 2 rank(s) share this host's memory"),
    ],
)
def test_the_choice(hosts: str, obstacles: list[str], gpus: list[str], name: str, reason: str) -> None:
    choice = choose("auto", list(hosts), obstacles, gpus)
    assert choice.name == name
    assert choice.reason.endswith(reason)
    on_the_host = choose("host", list(hosts), obstacles, gpus)
    assert on_the_host.name == choose("auto", list(hosts)).name
    assert "nccl" not in on_the_host.reason


def test_without_cuda_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("pycomm.backends.nccl.offers.load_driver", lambda: pytest.fail("loaded"))
    assert offer(asked_for=False) == Offer("", "this torch is built without CUDA", "")


class Cuda:
    """A machine with GPUs, as torch and the stand-in show it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, standin: Path, num_gpus: int, current: int = 0) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr("pycomm.backends.nccl.offers.load_driver", lambda: _C.CudaDriver([str(standin)]))
        monkeypatch.setenv("PYCOMM_NCCL_SO", str(standin))
        monkeypatch.setenv("STANDIN_GPU", "GPU 7")


def test_what_a_rank_offers(monkeypatch: pytest.MonkeyPatch, standin: Path) -> None:
    Cuda(monkeypatch, standin, 1)
    uuid = b"GPU 7".ljust(16, b"\0").hex()
    assert offer(asked_for=False) == offer(asked_for=True) == Offer("2.32.3", "", uuid)
    check = doctor.auto_backend()
    assert check.detail == (
        "nccl: each of the 1 rank(s) has a GPU of its own; more than 1 rank(s) share this host's memory (shm)"
    )
    monkeypatch.setenv("PYCOMM_NCCL_SO", "/nowhere/libnccl.so")
    found = offer(asked_for=False)
    assert (found.version, found.gpu) == ("", uuid)
    assert "/nowhere/libnccl.so" in found.obstacle
    assert "not nccl: NCCL cannot be loaded" in doctor.auto_backend().detail
    Cuda(monkeypatch, standin, 0)
    assert offer(asked_for=False) == Offer("", "torch sees no GPU: look at CUDA_VISIBLE_DEVICES and nvidia-smi", "")


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch, standin: Path) -> None:
    Cuda(monkeypatch, standin, 2)
    for name, value in {"RANK": 2, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert "LOCAL_RANK=2, but torch sees 2 GPU(s)" in offer(asked_for=False).obstacle


def test_gpus_that_do_not_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of those that this process sees, by their UUIDs, whatever numbers they have elsewhere."""
    gpu = object.__new__(Gpu)
    gpu.device = torch.device("cuda", 0)
    gpu.driver = SimpleNamespace(device_uuid=lambda index: f"GPU {index}")  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: peer != 2)
    gpu.check_reaches(["GPU 0", "GPU 1", "a GPU that is not visible here"])
    with pytest.raises(BackendUnavailableError, match="cuda:0 cannot access the memory of cuda:2"):
        gpu.check_reaches(["GPU 2", "GPU 0"])


def initialised(host: Communicator, path: str, folder: str, gpus: list[str | None], rank_without: int | None) -> Any:
    """Name of the back end, and of the device."""
    if gpus[host.rank] is not None:
        os.environ["STANDIN_GPU"] = str(gpus[host.rank])
    store = file_store(f"{folder}/store", host.world_size)
    try:
        with standing_in(path, folder) as gpu, pytest.MonkeyPatch.context() as patches:
            if host.rank == rank_without:
                patches.setattr("pycomm.communicator.offer", lambda asked_for: Offer("", ABSENT, ""))
            size = host.world_size
            with pycomm.init(store=store, rank=host.rank, world_size=size, timeout_s=TIMEOUT_S) as comm:
                tensor = torch.ones(3)
                comm.all_reduce(tensor)
                comm.synchronize()
                comm.barrier()
                assert (tensor == size).all()
                assert gpu.device == comm.device
                return comm.backend
    finally:
        os.environ.pop("STANDIN_GPU", None)


@pytest.mark.parametrize(
    ("gpus", "rank_without", "backend"),
    [([None, None], None, "nccl"), (["one", "one"], None, "shm"), ([None, None], 1, "shm")],
)
def test_init(pool: Pool, standin: Path, tmp_path: Path, gpus: Any, rank_without: int | None, backend: str) -> None:
    args = (str(standin), str(tmp_path), gpus, rank_without)
    assert pool.run(2, initialised, *args) == [backend] * 2


def asks_for_it(host: Communicator, path: str, folder: str) -> str:
    with standing_in(path, folder), pytest.MonkeyPatch.context() as patches:
        if host.rank == 1:
            patches.setattr("pycomm.communicator.offer", lambda asked_for: Offer("", ABSENT, ""))
        with pytest.raises(BackendUnavailableError) as caught:
            pycomm.init("nccl", store=file_store(f"{folder}/store", 2), rank=host.rank, world_size=2, timeout_s=60)
        return str(caught.value)


def test_who_asks_for_nccl_gets_it_or_an_error(pool: Pool, standin: Path, tmp_path: Path) -> None:
    messages = pool.run(2, asks_for_it, str(standin), str(tmp_path))
    assert messages == [f"backend='nccl': {ABSENT} (rank 1)"] * 2


def test_tensors_of_another_device_are_told_where_to_go() -> None:
    with pytest.raises(ValueError, match=r"on cpu, this communicator works on cuda:1: .*init\(backend='host'\)"):
        _C.checked_tensor(torch.ones(2), "the tensor", 1)
    with pytest.raises(ValueError, match=r"on meta, this communicator works on cpu: pass tensor.to\(comm.device\)"):
        _C.checked_tensor(torch.ones(2, device="meta"), "the tensor", -1)
