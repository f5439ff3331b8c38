"""What callers may hand over: memory that may be written, numbers, names, timeouts; and when a batch may be filled."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pycomm
from pycomm import Communicator
from pycomm.arguments import checked_timeout
from pycomm.errors import PycommError
from tests.pool import Pool


class OldArray:
    """As arrays were before DLPack 1: it has no words for what is read-only, so it shares nothing."""

    def __dlpack__(self, stream: None = None) -> object:
        raise BufferError("Cannot export readonly array since signalling readonly is unsupported by DLPack.")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def read_only_memory(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    with tempfile.NamedTemporaryFile() as file:
        np.full(12, float(rank), np.float32).tofile(file.name)
        mapped = np.memmap(file.name, np.float32, mode="r")  # a write to it is a fault
        frozen = np.full(12, float(rank), np.float32)
        frozen.flags.writeable = False
        whole, part = np.zeros(12 * n, np.float32), np.zeros(12, np.float32)
        for given in (mapped, frozen):
            refused: list[Callable[[], Any]] = [
                lambda given=given: comm.all_reduce(given),  # type: ignore[misc]
                lambda given=given: comm.broadcast(given),  # type: ignore[misc]
                lambda given=given: comm.reduce(given, rank),  # type: ignore[misc]
                lambda given=given: comm.recv(given, (rank + 1) % n),  # type: ignore[misc]
                lambda given=given: comm.reduce_scatter(given, whole),  # type: ignore[misc]
                lambda given=given: comm.scatter(given, whole, rank),  # type: ignore[misc]
                lambda given=given: comm.all_to_all(given, part),  # type: ignore[misc]
                lambda given=given: comm.all_gather(given, part[: 12 // n]),  # type: ignore[misc]
            ]
            for call in refused:
                with pytest.raises(ValueError, match="is read-only: .*pass a copy"):
                    call()
            comm.all_gather(whole, given)  # what is only read may be read-only
            assert whole.tolist() == [float(r) for r in range(n) for _ in range(12)]
            comm.reduce(np.ones(12, np.float32) if rank == 0 else given)  # and only the root's is written
            if n > 1 and rank == 0:
                comm.send(given, 1)
            elif rank == 1:
                comm.recv(part, 0)
                assert not part.any()
        for call in (lambda: comm.all_reduce(OldArray()), lambda: comm.send(OldArray(), 0)):
            with pytest.raises(ValueError, match="pass a copy"):
                call()
        comm.barrier()
        assert (frozen == rank).all()


def arguments_of_wrong_types(comm: Communicator) -> None:
    """One clear error each, on one rank or all, and the communicator goes on."""
    tensor = torch.ones(6)
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: comm.all_reduce(tensor, 3), TypeError, "op is 3: it is one of the names sum, avg"),  # type: ignore[arg-type]
        (lambda: comm.all_reduce(tensor, None), TypeError, "op is None"),  # type: ignore[arg-type]
        (lambda: comm.broadcast(tensor, 1.0), TypeError, "root is 1.0: it is a rank, an int from 0"),  # type: ignore[arg-type]
        (lambda: comm.broadcast(tensor, None), TypeError, "root is None"),  # type: ignore[arg-type]
        (lambda: comm.broadcast(tensor, 2**70), ValueError, "root is 1180591620717411303424, it must be 0 to"),
        (lambda: comm.send(tensor, "1"), TypeError, "dst is '1'"),  # type: ignore[arg-type]
        (lambda: comm.send(tensor, 99), ValueError, "dst is 99, it must be 0 to"),
        (lambda: comm.send(tensor, 0, "x"), TypeError, "tag is 'x': it is an int"),  # type: ignore[arg-type]
        (lambda: comm.send(tensor, 0, 2**63), ValueError, "tag=9223372036854775808: .* 64 bits"),
        (lambda: comm.recv(tensor, 1.5), TypeError, "src is 1.5"),  # type: ignore[arg-type]
        (lambda: comm.all_gather(tensor, tensor, output_splits=3), TypeError, "output_splits is 3"),  # type: ignore[arg-type]
        (lambda: comm.all_to_all(tensor, tensor.clone(), ["a"], None), TypeError, "output_splits"),  # type: ignore[list-item]
        (lambda: comm.barrier(async_op="no"), TypeError, "async_op is 'no': it is True or False"),  # type: ignore[arg-type]
        (lambda: comm.empty(2.5), TypeError, "empty: size 2.5 .* int"),  # type: ignore[arg-type]
        (lambda: comm.empty("3"), TypeError, "empty: size '3'"),  # type: ignore[arg-type]
        (lambda: comm.empty(2**61), ValueError, "more than"),
        (lambda: comm.empty(2, dtype="float32"), TypeError, "dtype is 'float32': .*torch.float32"),  # type: ignore[arg-type]
        (lambda: comm.empty(2, dtype=torch.quint8), ValueError, "dtype quint8"),
        (lambda: comm.empty(2, dtype=torch.bits8), ValueError, "dtype bits8"),
        (lambda: comm.split("red"), TypeError, "color is 'red': it is an int, or None"),  # type: ignore[arg-type]
        (lambda: comm.split(0, 0.5), TypeError, "key is 0.5"),  # type: ignore[arg-type]
        (lambda: comm.abort(None), TypeError, "reason is None: it is a text"),  # type: ignore[arg-type]
    ]
    for call, error, text in wrong:
        with pytest.raises(error, match=text):
            call()
    for timeout_s, error in {math.inf: ValueError, -1.0: ValueError, "soon": TypeError, True: TypeError}.items():
        with pytest.raises(error, match="timeout_s"):
            comm.barrier(timeout_s=timeout_s)  # type: ignore[arg-type]
    if comm.backend == "shm":
        flag = comm.flag(comm.empty(1, dtype=torch.int64))
        with pytest.raises(ValueError, match="timeout_s=inf"):
            flag.wait(1, timeout_s=math.inf)
        with pytest.raises(ValueError, match="rank is 99"):
            flag.wait(1, rank=99)
    work = comm.barrier(async_op=True)
    assert work is not None
    with pytest.raises(ValueError, match="timeout_s=nan"):
        work.wait(math.nan)
    work.wait()
    comm.barrier()


@pytest.mark.parametrize("world_size", [1, 2])
def test_arguments_of_wrong_types(pool: Pool, world_size: int) -> None:
    """Catches errors that do not say what to write, sizes and dtypes that end the process, waits without a bound."""
    pool.run(world_size, arguments_of_wrong_types)


@pytest.mark.parametrize("world_size", [1, 2])
def test_read_only_memory_is_never_written(pool: Pool, world_size: int) -> None:
    pool.run(world_size, read_only_memory)


@pytest.mark.parametrize(
    ("timeout_s", "error"),
    [(math.inf, ValueError), (math.nan, ValueError), (-1, ValueError), (0, ValueError), (1e12, ValueError),
     (True, TypeError), ("5", TypeError), (None, TypeError), (1j, TypeError)],
)  # fmt: skip
def test_timeouts_are_bounded(timeout_s: Any, error: type[Exception]) -> None:
    """Catches waits without an end, and times that no clock can hold."""
    with pytest.raises(error, match="timeout_s"):
        checked_timeout(timeout_s)
    with pytest.raises(error, match="timeout_s"):
        pycomm.init(timeout_s=timeout_s)


def test_timeouts_of_any_number() -> None:
    assert [checked_timeout(value) for value in (5, 0.25, np.float32(0.5), np.int64(3), 1e9)] == [5, 0.25, 0.5, 3, 1e9]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [({"backend": 3}, TypeError, "backend is 3: it is one of the names"),
     ({"rank": "0", "world_size": 1}, TypeError, "rank is '0': it is an int"),
     ({"rank": 0, "world_size": 1.0}, TypeError, "world_size is 1.0: it is an int"),
     ({"strict": "yes"}, TypeError, "strict is 'yes': it is True or False"),
     ({"name": 5}, TypeError, "name is 5: it is a text"),
     ({"store": "/tmp"}, TypeError, "store is '/tmp': it is a torch.distributed.Store"),
     ({"device": "cuda:0", "backend": "nccl"}, TypeError, "device is 'cuda:0': it is a torch.device")],
)  # fmt: skip
def test_init_says_what_to_write(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pycomm.init(**arguments)


def test_a_batch_that_is_over_takes_no_more() -> None:
    """Catches messages that are dropped: those that come after their block had nobody to start them."""
    with pycomm.init() as comm:
        with comm.batch() as batch:
            batch.send(torch.ones(3), 0)
            batch.recv(torch.zeros(3), 0)
        for late in (lambda: batch.send(torch.ones(3), 0), lambda: batch.recv(torch.ones(3), 0)):
            with pytest.raises(PycommError, match="its block has ended"):
                late()
        with batch:  # another block of the same messages' owner
            batch.send(torch.full((3,), 2.0), 0)
            received = torch.zeros(3)
            batch.recv(received, 0)
        assert received.tolist() == [2.0] * 3
