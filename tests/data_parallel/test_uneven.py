"""Ranks with different numbers of batches outside of join(): whoever waits is told what to do."""

from unittest.mock import patch

import pytest

from pycomm.data_parallel import DataParallel
from pycomm.errors import PycommError
from tests.data_parallel.helpers import loss_of, message_of, mlp
from tests.processes import Ranks


def leaves(comm, connection):
    comm.close()


def calls_something_else(comm, connection):
    return message_of(PycommError, comm.barrier)


def waits(comm, connection):
    connection.poll(60)  # until the test is over


AFTERWARDS = {"exited": leaves, "called something else": calls_something_else, "did not arrive": waits}


def train_unevenly(comm, connection):
    """Rank 0 has three batches, rank 1 two; what rank 0's third backward says."""
    what = connection.recv()
    ddp = DataParallel(mlp(), comm)
    for step in range(2):
        loss_of(ddp, comm.rank, step).backward()
    if comm.rank == 1:
        return AFTERWARDS[what](comm, connection)
    connection.send("waits")
    with patch.object(type(comm), "timeout_s", 1.0):  # nobody will come
        return message_of(PycommError, lambda: loss_of(ddp, comm.rank, 2).backward())


@pytest.mark.parametrize("what", AFTERWARDS)
def test_a_rank_without_a_batch_is_named_with_join(tmp_path, what):
    """Catches errors of communication that leave people alone with "rank 1 is gone"."""
    with Ranks(tmp_path, 2, train_unevenly) as ranks:
        for connection in ranks.connections:
            connection.send(what)
        assert ranks.connections[0].recv() == "waits"
        message, _ = ranks.result(0)
        assert "join()" in message, message
        assert "rank 1" in message, message
