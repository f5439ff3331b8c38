"""What is not the plain case: unused, frozen, shared and empty parameters, checkpointing, double backward."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pycomm
from pycomm.data_parallel import DataParallel, ShardedAdamW
from pycomm.errors import PycommError
from tests.data_parallel.helpers import (
    HIDDEN,
    IN,
    OUT,
    Recorder,
    batch,
    differing,
    gradients,
    message_of,
    mlp,
    own_communicator,
    rank_order_average,
    seeded,
)
from tests.pool import WorkerError

WORLD_SIZES = (1, 2, 3, 4)
every_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)


class Branches(nn.Module):
    """A trunk, and one head per rank that only the ranks with ``use`` go through."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.trunk = nn.Linear(IN, HIDDEN)
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, OUT) for _ in range(num_heads))

    def forward(self, x, use):
        return sum(self.heads[index](self.trunk(x)) for index in use)


# Unused parameters


@every_world_size
def test_an_unused_parameter_is_named_and_peers_do_not_wait(pool, world_size):
    # The error leaves the workers, which the pool then replaces: abort has ended their communicator.
    with pytest.raises(WorkerError) as raised:
        pool.run(world_size, leave_a_head_out)
    _, *by_rank = str(raised.value).split("--- rank ")
    assert len(by_rank) == world_size
    # Only rank 0 leaves head 1 out. The others end their wait with rank 0's reason.
    assert "2 parameter(s) got no gradient in this backward: 'heads.1.weight', 'heads.1.bias'" in by_rank[0]
    assert "find_unused=True" in by_rank[0]
    assert all("PeerLostError" in text and "'heads.1.weight'" in text for text in by_rank[1:])


def leave_a_head_out(comm):
    ddp = DataParallel(seeded(Branches(2)), comm)
    ddp(batch(comm.rank)[0], [0] if comm.rank == 0 else [0, 1]).sum().backward()


@every_world_size
@pytest.mark.parametrize("bucket_mb", [0.001, 25.0])
def test_find_unused_counts_missing_gradients_as_zeros(pool, world_size, bucket_mb):
    assert pool.run(world_size, differing_with_find_unused, bucket_mb) == [[]] * world_size


def branch_gradients(model, rank, world_size):
    """Head r is used by rank r only, the last head by nobody; the second step adds to the first."""
    for step in range(2):
        model(batch(rank, step)[0], [rank]).square().sum().backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if step == 0:
            model.zero_grad()
    return gradients(getattr(model, "module", model))


def differing_with_find_unused(comm, bucket_mb):
    num_heads = comm.world_size + 1
    ddp = DataParallel(seeded(Branches(num_heads)), comm, bucket_mb=bucket_mb, find_unused=True)
    got = branch_gradients(ddp, comm.rank, comm.world_size)
    parts = [branch_gradients(seeded(Branches(num_heads)), rank, comm.world_size) for rank in range(comm.world_size)]
    return differing(got, {name: rank_order_average([part[name] for part in parts]) for name in parts[0]})


@every_world_size
def test_gradients_that_came_under_no_sync_only_are_averaged(pool, world_size):
    assert pool.run(world_size, differing_after_no_sync_only) == [[]] * world_size


def no_sync_only_gradients(model, rank, synchronised):
    if synchronised:
        with model.no_sync():
            model(batch(rank, 0)[0], [0, 1]).square().sum().backward()
    else:
        model(batch(rank, 0)[0], [0, 1]).square().sum().backward()
    model(batch(rank, 1)[0], [0]).square().sum().backward()
    return gradients(getattr(model, "module", model))


def differing_after_no_sync_only(comm):
    got = no_sync_only_gradients(DataParallel(seeded(Branches(2)), comm, bucket_mb=0.001), comm.rank, True)
    parts = [no_sync_only_gradients(seeded(Branches(2)), rank, False) for rank in range(comm.world_size)]
    return differing(got, {name: rank_order_average([part[name] for part in parts]) for name in parts[0]})


@every_world_size
def test_a_gradient_that_the_user_stored_is_averaged(pool, world_size):
    assert pool.run(world_size, stored_gradient) == [True] * world_size


def stored_gradient(comm):
    ddp = DataParallel(seeded(Branches(2)), comm)
    head = ddp.module.heads[1].weight
    head.grad, ddp.module.heads[1].bias.grad = torch.full_like(head, comm.rank), torch.zeros(OUT)
    ddp(batch(comm.rank)[0], [0]).sum().backward()
    want = rank_order_average([torch.full_like(head, rank) for rank in range(comm.world_size)])
    return torch.equal(head.grad, want)


def test_zero_grad_forgets_what_no_sync_accumulated(pool):
    assert "'heads.1.weight'" in pool.run(1, message_after_forgetting)[0]


def message_after_forgetting(comm):
    with own_communicator(comm) as own:
        ddp = DataParallel(seeded(Branches(2)), own)
        with ddp.no_sync():
            ddp(batch(0)[0], [0, 1]).sum().backward()
        ddp.zero_grad(set_to_none=True)
        return message_of(PycommError, ddp(batch(0)[0], [0]).sum().backward)


# Frozen, shared and empty parameters


@every_world_size
def test_frozen_shared_and_empty_parameters(pool, world_size):
    assert pool.run(world_size, differing_in_odd_model) == [[]] * world_size


def odd_model():
    model = mlp()
    model[2].weight.requires_grad_(False)
    model.append(nn.Linear(OUT, OUT))
    model[5].weight = model[4].bias  # one parameter under two names, of shapes that no Linear would give it
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 7)))
    return seeded(model)


def odd_loss(model, x):
    plain = getattr(model, "module", model)
    hidden = x
    for layer in list(plain)[:5]:
        hidden = layer(hidden)
    return (hidden * plain[5].weight + plain[5].bias).square().sum() + plain.empty.sum()


class OddForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = odd_model()

    def forward(self, x):
        return odd_loss(self.inner, x)


def odd_gradients(model, rank):
    model(batch(rank)[0]).backward()
    return gradients(getattr(model, "module", model))


def differing_in_odd_model(comm):
    ddp = DataParallel(OddForward(), comm, symmetric=False)
    shared, frozen = ddp.module.inner[4].bias, ddp.module.inner[2].weight
    got = odd_gradients(ddp, comm.rank)
    assert frozen.grad is None
    assert ddp.module.inner[5].weight is shared
    # Padded to 64 bytes = 16 floats: each parameter but the frozen one once.
    numels = [IN * HIDDEN, HIDDEN, HIDDEN, HIDDEN * OUT, OUT, OUT, 0]
    assert ddp.bucket_bytes == [sum(-(-numel // 16) * 64 for numel in numels)]
    parts = [odd_gradients(OddForward(), rank) for rank in range(comm.world_size)]
    return differing(got, {name: rank_order_average([part[name] for part in parts]) for name in parts[0]})


# Checkpointing, double backward, sparse gradients


class Checkpointed(nn.Module):
    """Every layer in a checkpoint of its own: reentrant ones run a backward inside the backward."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.layers, self.reentrant = mlp(), reentrant

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return {"output": [x]}


def checkpointed_gradients(model, rank):
    x = batch(rank)[0].requires_grad_()
    model(x)["output"][0].square().sum().backward()
    return gradients(getattr(model, "module", model))


@every_world_size
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(pool, world_size, reentrant):
    assert pool.run(world_size, differing_when_checkpointed, reentrant) == [([], 1)] * world_size


def differing_when_checkpointed(comm, reentrant):
    events = []
    ddp = DataParallel(Checkpointed(reentrant), Recorder(comm, events))
    events.clear()
    got = checkpointed_gradients(ddp, comm.rank)
    parts = [checkpointed_gradients(Checkpointed(reentrant), rank) for rank in range(comm.world_size)]
    want = {name: rank_order_average([part[name] for part in parts]) for name in parts[0]}
    return differing(got, want), len(events)


@every_world_size
def test_a_gradient_penalty_communicates_once(pool, world_size):
    assert pool.run(world_size, differing_with_penalty) == [([], 1)] * world_size


def penalty_gradients(model, rank):
    x = batch(rank)[0].requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    (output.square().sum() + slope.square().sum()).backward()
    return gradients(getattr(model, "module", model))


def differing_with_penalty(comm):
    events = []
    ddp = DataParallel(mlp(), Recorder(comm, events))
    events.clear()
    got = penalty_gradients(ddp, comm.rank)
    parts = [penalty_gradients(mlp(), rank) for rank in range(comm.world_size)]
    want = {name: rank_order_average([part[name] for part in parts]) for name in parts[0]}
    return differing(got, want), len(events)


def test_what_cannot_be_averaged_is_said(pool):
    create_graph, sparse, twice = pool.run(1, messages_of_impossible_backwards)[0]
    assert "create_graph=True" in create_graph
    assert "'weight' is sparse" in sparse
    assert "'layers.bias' got a gradient twice" in twice


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Linear(IN, IN)

    def forward(self, x):
        return checkpoint(self.layers, checkpoint(self.layers, x, use_reentrant=True), use_reentrant=True)


def messages_of_impossible_backwards(comm):
    x = batch(0)[0].requires_grad_()
    ddp = DataParallel(mlp(), comm)
    create_graph = message_of(PycommError, lambda: ddp(x).sum().backward(create_graph=True))
    embedding = DataParallel(nn.Embedding(5, 3, sparse=True), comm)
    sparse = message_of(PycommError, lambda: embedding(torch.tensor([1, 2])).sum().backward())
    twice = DataParallel(Twice(), comm)
    return create_graph, sparse, message_of(PycommError, lambda: twice(x).sum().backward())


# Clipping


@every_world_size
def test_gradients_that_the_user_stored_are_clipped(pool, world_size):
    """Catches that the norm is taken of them, and what is scaled is the memory of the buckets."""
    assert all(pool.run(world_size, clips_stored_gradients))


def clips_stored_gradients(comm):
    ddp = DataParallel(mlp(), comm)
    ddp(batch(comm.rank)[0]).square().sum().backward()
    stored = [3 * param.grad for param in ddp.parameters()]
    for param, grad in zip(ddp.parameters(), stored, strict=True):
        param.grad = grad.clone()
    norm = float(pycomm.clip_grad_norm_(ddp, 0.1))
    now = float(pycomm.clip_grad_norm_(ddp, 1e9))
    # 1e-6 is in the factor's denominator; the rest is the rounding of each product and of the result to fp32.
    is_scaled = norm > 0.1 and abs(now - 0.1) <= 0.1 * (1e-6 / norm + 4 * 2**-24)
    return is_scaled and norm == float(pycomm.clip_grad_norm_(stored_in(stored), 1e9))  # to the bit, on every rank


def stored_in(grads):
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


# Parameters that are not on the CPU


def test_gradients_elsewhere_are_refused_before_anything_is_sent(pool):
    """Catches that addresses of a GPU's memory are read by the host, and that parameters are moved to it."""
    for messages, num_sent in pool.run(2, refusals_of_other_devices):
        assert all("works on the CPU alone" in message and "on meta" in message for message in messages), messages
        assert num_sent == 0


class Counting(Recorder):
    """Counts what is called, averages or not."""

    def __getattr__(self, name):
        self.events.append(name)
        return super().__getattr__(name)


def refusals_of_other_devices(comm):
    """On a wrapper whose parameters are told to be elsewhere, as no GPU is here."""
    events = []
    ddp = DataParallel(mlp(), Counting(comm, events))
    ddp(batch(comm.rank)[0]).sum().backward()
    on_meta = nn.Parameter(torch.empty(4, device="meta"))
    on_meta.grad = torch.empty(4, device="meta")
    for trained in ddp._engine.gradients.params:
        trained.param = on_meta
    events.clear()
    messages = [
        message_of(NotImplementedError, ShardedAdamW, ddp),
        message_of(NotImplementedError, pycomm.clip_grad_norm_, ddp, 1.0),
        message_of(NotImplementedError, pycomm.clip_grad_norm_, [on_meta], 1.0),
    ]
    return messages, len([name for name in events if name not in ("rank", "world_size", "device")])
