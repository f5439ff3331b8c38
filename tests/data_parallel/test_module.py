"""The wrapper: same replicas at the start, what it refuses, the plain module's state."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from pycomm.data_parallel import DataParallel
from pycomm.errors import MismatchError, PycommError
from tests.data_parallel.helpers import (
    batch,
    bits,
    differing,
    expected,
    gradients,
    local_gradients,
    loss_of,
    message_of,
    mlp,
)

WORLD_SIZES = (1, 2, 3, 4)
every_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)


class Mixed(nn.Module):
    """Parameters and buffers of many dtypes and layouts, other values on each rank."""

    def __init__(self, rank: int):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.coarse = nn.Parameter(torch.full((3,), float(rank), dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.full((2, 2), rank), requires_grad=False)
        self.register_buffer("flags", torch.tensor([rank % 2 == 0, True]))
        self.register_buffer("count", torch.tensor(rank + 7))
        self.register_buffer("transposed", torch.full((4, 3), rank + 0.5).t())
        self.register_buffer("empty", torch.empty(0))
        nn.init.constant_(self.conv.weight, rank)


@every_world_size
def test_wrapping_gives_every_rank_the_values_of_rank_0(pool, world_size):
    results = pool.run(world_size, wrapped_state)
    want = {name: bits(tensor) for name, tensor in Mixed(0).state_dict().items() if name != "conv.bias"}
    assert results == [(want, (18, 1, 6, 2))] * world_size


def wrapped_state(comm):
    module = Mixed(comm.rank)
    DataParallel(module, comm, symmetric=False)
    state = {name: bits(tensor) for name, tensor in module.state_dict().items() if name != "conv.bias"}
    return state, module.conv.weight.stride()


def different_model(rank, difference):
    if difference == "parameter count":
        return nn.Sequential(*[nn.Linear(3, 3) for _ in range(2 if rank == 1 else 1)])
    if difference == "layout":
        conv = nn.Conv2d(2, 2, 3)
        return conv.to(memory_format=torch.channels_last) if rank == 1 else conv
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    if rank == 1 and difference == "shape":
        model[0] = nn.Linear(2, 3)
    if rank == 1 and difference == "dtype":
        model[0].weight.data = model[0].weight.data.double()
    if rank == 1 and difference == "frozen":
        model[0].weight.requires_grad_(False)
    if rank == 1 and difference == "buffer":
        model[1].running_mean = torch.zeros(4)
    return model


DIFFERENCES = {
    "parameter count": "nothing (it has 2 parameters and buffers); rank 1 has parameter '1.weight' torch.float32",
    "layout": "rank 1 has parameter 'weight' torch.float32 [2, 2, 3, 3] (strides [18, 1, 6, 2])",
    "shape": "rank 1 has parameter '0.weight' torch.float32 [3, 2]",
    "dtype": "rank 1 has parameter '0.weight' torch.float64 [3, 3]",
    "frozen": "frozen",
    "buffer": "buffer '1.running_mean' torch.float32 [3]; rank 1 has buffer '1.running_mean' torch.float32 [4]",
    "options": "rank 1 has bucket_mb=2.0",
}


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_different_models_are_refused_on_every_rank(pool, world_size, difference):
    messages = pool.run(world_size, message_of_different_models, difference)
    assert all(DIFFERENCES[difference] in message for message in messages)
    assert len(set(messages)) == 1


def message_of_different_models(comm, difference):
    model = different_model(comm.rank, difference)
    bucket_mb = 2.0 if difference == "options" and comm.rank == 1 else 1.0
    return message_of(MismatchError, lambda: DataParallel(model, comm, bucket_mb=bucket_mb))


def test_a_module_that_is_wrapped_already_is_refused(pool):
    """Catches gradients that two wrappers average, each into buckets of its own."""
    *messages, names = pool.run(2, messages_of_wrapping_again)[0]
    assert "'0.weight'" in messages[0]
    assert "'module.0.weight'" in messages[1]
    assert "'1.0.weight'" in messages[2]
    assert all("wrap" in message for message in messages)
    assert "DistributedDataParallel" in messages[3]
    assert names == []


def messages_of_wrapping_again(comm):
    model, part = mlp(), mlp()
    ddp, _ = DataParallel(model, comm), DataParallel(part, comm)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    theirs = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(theirs)
    theirs.module = mlp()  # made without a process group
    modules = (model, Holder(), nn.Sequential(nn.Linear(2, 2), part), nn.Sequential(theirs))
    messages = [message_of(ValueError, DataParallel, module, comm) for module in modules]
    del ddp
    again = DataParallel(model, comm)  # the first one is gone
    loss_of(again, comm.rank).backward()
    return *messages, differing(gradients(again.module), expected(comm.world_size))


def test_wrong_arguments(pool):
    frozen, int_dtype, nested, meta, *sizes = pool.run(1, messages_of_wrong_arguments)[0]
    assert "no trainable parameter" in frozen
    assert "'weight' is torch.complex64" in int_dtype
    assert "contains a DataParallel" in nested
    assert "'weight' is on meta" in meta
    assert all("bucket_mb" in message for message in sizes)


def messages_of_wrong_arguments(comm):
    models = [
        mlp().requires_grad_(False),
        nn.Linear(2, 2, dtype=torch.complex64),
        nn.Sequential(DataParallel(mlp(), comm)),
        nn.Linear(2, 2, device="meta"),
    ]
    found = [message_of(ValueError, DataParallel, model, comm) for model in models]
    for bucket_mb in (0, -1.0, float("nan"), float("inf")):
        build = partial(DataParallel, mlp(), comm, bucket_mb=bucket_mb)
        found.append(message_of(ValueError, build))
    return found


def replace_parameter(model):
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def add_parameter(model):
    model.append(nn.Linear(2, 2))


def remove_layer(model):
    del model[4]


def freeze(model):
    model[0].bias.requires_grad_(False)


def cast(model):
    model.double()


CHANGES = [
    (replace_parameter, "'2.weight' was added or replaced"),
    (add_parameter, "'5.weight' was added or replaced"),
    (remove_layer, "6 parameters were wrapped, 4 of them are left"),
    (freeze, "requires_grad of '0.bias' was set to False"),
    (cast, "'0.weight' was torch.float32 [24, 12] on cpu and is torch.float64 [24, 12] on cpu now"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_model_changed_after_wrapping_is_refused(pool, change, said):
    assert said in pool.run(1, message_after_change, change)[0]


def message_after_change(comm, change):
    ddp = DataParallel(mlp(), comm)
    ddp(batch(0)[0])
    change(ddp.module)
    return message_of(PycommError, ddp, batch(0)[0])


@every_world_size
def test_state_dict_is_that_of_the_plain_module(pool, world_size):
    assert pool.run(world_size, state_round_trip) == [True] * world_size


def state_round_trip(comm):
    ddp = DataParallel(mlp(), comm)
    assert list(ddp.state_dict()) == list(mlp().state_dict())
    assert list(ddp.state_dict(prefix="a.")) == [f"a.{name}" for name in mlp().state_dict()]
    other = mlp(seed=1).state_dict()
    ddp.load_state_dict(other)
    assert "assign=True" in message_of(ValueError, lambda: ddp.load_state_dict(other, assign=True))
    assert "5.weight" in message_of(RuntimeError, ddp.load_state_dict, {**other, "5.weight": torch.zeros(1)})
    plain = mlp(seed=2)
    plain.load_state_dict(ddp.state_dict())
    loss_of(ddp, comm.rank).backward()  # loading does not count as a change of the model
    return all(bits(plain.state_dict()[name]) == bits(other[name]) for name in other)


def test_forward_passes_everything_through(pool):
    assert pool.run(1, forward_results) == [(True, False, True)]


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, *, double=False):
        return {"y": (self.layer(x) * (2 if double else 1),), "n": 3}


def forward_results(comm):
    ddp = DataParallel(Chooses(), comm)
    x = torch.ones(1, 2)
    doubled, single = ddp(x, double=True), ddp(x)
    ddp.eval()
    with torch.no_grad():
        quiet = ddp(x)["y"][0]
    return torch.equal(doubled["y"][0], 2 * single["y"][0]), ddp.module.training, torch.equal(quiet, single["y"][0])


def test_a_dropped_wrapper_leaves_a_plain_module(pool):
    assert pool.run(1, after_dropping_the_wrapper) == [(True, [])]


def after_dropping_the_wrapper(comm):
    model = mlp()
    ddp = DataParallel(model, comm)
    loss_of(ddp, 0).backward()
    engine = weakref.ref(ddp._engine)
    del ddp
    gc.collect()
    model.zero_grad()
    loss_of(model, 0).backward()
    return engine() is None, differing(gradients(model), local_gradients(mlp(), 0))


def test_a_copy_of_the_module_is_plain(pool):
    assert pool.run(1, differing_in_copy) == [[]]


def differing_in_copy(comm):
    ddp = DataParallel(mlp(), comm)
    loss_of(ddp, 0).backward()
    twin = copy.deepcopy(ddp.module)
    return differing(local_gradients(twin, 0), local_gradients(mlp(), 0))
