"""Wrong arguments, dtypes and memory over several hosts: what one host refuses is refused before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pycomm import Communicator
from tests.host.dtype_cases import PAIRS, mismatched_pairs
from tests.host.test_arguments import arguments_of_wrong_types, read_only_memory
from tests.host.test_collective_errors import wrong_arguments as wrong_arguments_of_collectives
from tests.host.test_dtypes import every_dtype
from tests.hosts.helpers import Hosts
from tests.test_communicator import wrong_arguments


def everything_wrong(comm: Communicator, _: Any) -> None:
    checks: tuple[Callable[[Communicator], object], ...] = (
        wrong_arguments,
        wrong_arguments_of_collectives,
        arguments_of_wrong_types,
        read_only_memory,
        every_dtype,
    )
    for check in checks:
        check(comm)
    if comm.rank == 0:  # one message of several is wrong: none of them starts
        with pytest.raises(ValueError, match="tag="), comm.batch() as batch:
            batch.send(torch.ones(3), 1)
            batch.send(torch.ones(3), 1, -(2**63))
        comm.send(torch.zeros(3), 1)
    elif comm.rank == 1:
        received = torch.ones(3)
        comm.recv(received, 0)
        assert not received.any()
    comm.barrier()


@pytest.mark.parametrize(("layout", "backend"), [("aab", "auto"), ("ab", "gloo")])
def test_wrong_arguments_send_nothing(layout: str, backend: str) -> None:
    """Catches an average of integers that ends ranks by a signal, and calls that only some ranks have entered."""
    with Hosts(layout, everything_wrong, backend=backend) as hosts:
        hosts.results()


def test_no_dtype_passes_for_another() -> None:
    """Catches bytes that are reinterpreted; every dtype meets its neighbours in the list."""
    neighbours = [pair for pair in PAIRS if pair[0].itemsize == pair[1].itemsize or torch.uint8 in pair]
    with Hosts("ab", mismatched_pairs, neighbours, strict=True) as hosts:
        hosts.results()
