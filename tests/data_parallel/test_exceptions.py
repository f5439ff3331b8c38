"""A backward that raises, an interrupted wait, a closed communicator: what is said, and that training can go on."""

import pytest
from torch import nn

from pycomm.data_parallel import DataParallel
from pycomm.errors import PycommError
from tests.data_parallel.helpers import (
    FailInBackward,
    Recorder,
    differing,
    expected,
    gradients,
    loss_of,
    message_of,
    mlp,
    own_communicator,
)

WORLD_SIZES = (1, 2, 3, 4)
every_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)


class Fragile(nn.Module):
    """An MLP that raises in the backward, in front of its first layer (``where`` 0) or after it (1)."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.where = None

    def forward(self, x):
        if self.where == 0:
            x = FailInBackward.apply(x.requires_grad_())
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if self.where == 1 and number == 1:
                x = FailInBackward.apply(x)
        return x


@every_world_size
@pytest.mark.parametrize("failing", [[0], [1], [1, 2], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("overlap", [True, False])
def test_training_goes_on_after_an_exception_in_backward(pool, world_size, failing, where, overlap):
    failing = [rank for rank in failing if rank < world_size]
    results = pool.run(world_size, recover_from_exceptions, failing, where, overlap)
    for rank, (messages, names) in enumerate(results):
        if rank in failing:
            assert messages == ["planted"] * 2
        elif failing:
            assert all(f"backward failed on rank(s) {failing}" in message for message in messages)
        assert names == []


def recover_from_exceptions(comm, failing, where, overlap):
    """One step fails twice, with and without set_to_none; the step after each must be right."""
    ddp = DataParallel(Fragile(), comm, bucket_mb=0.001, overlap=overlap)
    messages, names = [], []
    for set_to_none in (True, False):
        ddp.module.where = where if comm.rank in failing else None
        loss = loss_of(ddp, comm.rank, 7)
        if failing:
            messages.append(message_of(RuntimeError, loss.backward))
        else:
            loss.backward()
        ddp.module.where = None
        ddp.zero_grad(set_to_none=set_to_none)
        loss_of(ddp, comm.rank, 1).backward()
        want = {f"layers.{name}": grad for name, grad in expected(comm.world_size, (1,)).items()}
        names += differing(gradients(ddp.module), want)
    return messages, names


def test_a_backward_without_a_forward_after_an_exception_is_refused(pool):
    message, names = pool.run(1, backward_after_exception)[0]
    assert "call forward through DataParallel" in message
    assert names == []


def backward_after_exception(comm):
    ddp = DataParallel(Fragile(), comm)
    earlier = loss_of(ddp, 0)
    ddp.module.where = 1
    message_of(RuntimeError, loss_of(ddp, 0).backward)
    ddp.module.where = None
    message = message_of(PycommError, earlier.backward)
    loss = loss_of(ddp, 0)
    ddp.zero_grad()
    loss.backward()
    return message, differing(gradients(ddp.module.layers), expected(1))


class InterruptedWork:
    def wait(self):
        raise KeyboardInterrupt

    def done(self):
        return False


class InterruptingCommunicator(Recorder):
    def all_reduce(self, tensor, op="sum", async_op=False):
        work = super().all_reduce(tensor, op, async_op)
        return InterruptedWork() if async_op else work


def test_an_interrupted_wait_ends_the_communicator(pool):
    assert "interrupted while it waited" in pool.run(1, message_after_interrupted_wait)[0]


def message_after_interrupted_wait(comm):
    with own_communicator(comm) as own:
        ddp = DataParallel(mlp(), InterruptingCommunicator(own, []))
        message_of(KeyboardInterrupt, loss_of(ddp, 0).backward)
        return message_of(PycommError, loss_of, ddp, 0)


@every_world_size
def test_a_closed_communicator_is_said(pool, world_size):
    assert all("closed" in message for message in pool.run(world_size, message_of_closed))


def message_of_closed(comm):
    with own_communicator(comm) as own:
        ddp = DataParallel(mlp(), own)
    return message_of(Exception, lambda: loss_of(ddp, comm.rank).backward())
