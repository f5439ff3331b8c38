"""ShardedAdamW(overlap_forward=True): the step goes on while the next forward begins, and nobody reads too early."""

import itertools
import time

import pytest
import torch
from torch import nn

import pycomm
from pycomm.data_parallel import DataParallel, ShardedAdamW
from tests.data_parallel.helpers import bits, differing, message_of, seeded
from tests.data_parallel.training import loss_on, network, weight_bits

LATE_S = 0.2  # rank 1 begins its step so much later


@pytest.mark.parametrize("world_size", [1, 3])
def test_weights_are_the_same_bits(pool, world_size):
    assert pool.run(world_size, ways_with_other_weights) == [[]] * world_size


def ways_with_other_weights(comm):
    found = []
    for stage, overlap, dtype in itertools.product((1, 2), (True, False), (torch.float32, torch.bfloat16)):
        weights = []
        for overlap_forward in (False, True):
            ddp = DataParallel(network(dtype), comm, bucket_mb=0.02, overlap=overlap)
            optimizer = ShardedAdamW(ddp, lr=0.01, stage=stage, overlap_forward=overlap_forward)
            for step in range(4):
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                with ddp.no_sync():
                    loss_on(ddp, comm.rank, step, 1).backward()
                loss_on(ddp, comm.rank, step).backward()
                pycomm.clip_grad_norm_(ddp, 0.5)
                optimizer.step()
            optimizer.synchronize()
            weights.append(weight_bits(ddp))
        if weights[0] != weights[1]:
            found.append((stage, overlap, dtype))
    return found


class Borrowing(nn.Module):
    """Reads the weight of a child that it never calls, as torch.nn.MultiheadAttention does."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.borrowed = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.first(x), self.borrowed.weight, self.borrowed.bias)


def forward(ddp, optimizer):
    return {"y": ddp(torch.ones(2, 8))}


def forward_without_gradients(ddp, optimizer):
    with torch.no_grad():
        return forward(ddp, optimizer)


def state_dict(ddp, optimizer):
    return {name: value.clone() for name, value in ddp.state_dict().items()}


def state_dict_of_a_part(ddp, optimizer):
    return {name: value.clone() for name, value in ddp.module.borrowed.state_dict().items()}


def synchronised_parameters(ddp, optimizer):
    optimizer.synchronize()
    return {name: param.detach().clone() for name, param in ddp.module.named_parameters()}


READERS = (forward, forward_without_gradients, state_dict, state_dict_of_a_part, synchronised_parameters)


@pytest.mark.parametrize("stage", [1, 2])
def test_whoever_reads_parameters_gets_the_final_ones_though_a_rank_is_late(pool, stage):
    under_way, other = zip(*pool.run(2, early_readers, stage), strict=True)
    assert under_way[0] == [True] * len(READERS)  # on rank 0, whose step cannot be over when it returns
    assert other == ([], [])


def early_readers(comm, stage):
    under_way, found = [], []
    for reader in READERS:
        results = []
        for overlap_forward in (False, True):
            ddp = DataParallel(seeded(Borrowing()), comm)
            optimizer = ShardedAdamW(ddp, lr=0.01, stage=stage, overlap_forward=overlap_forward)
            ddp(torch.ones(2, 8) * (1 + comm.rank)).sum().backward()
            comm.barrier()
            if overlap_forward and comm.rank == 1:
                time.sleep(LATE_S)
            optimizer.step()
            if overlap_forward:
                under_way.append(bool(ddp._engine.pending._works))
            results.append(reader(ddp, optimizer))
        if differing(*results):
            found.append(reader.__name__)
    return under_way, found


def test_gradients_that_the_step_still_reads_are_not_overwritten(pool):
    assert pool.run(2, weights_after_a_backward_without_forward) == [True, True]


def weights_after_a_backward_without_forward(comm):
    """The second backward reads parameters directly, so only its gradients wait for the step."""
    weights = []
    for overlap_forward in (False, True):
        ddp = DataParallel(seeded(Borrowing()), comm)
        optimizer = ShardedAdamW(ddp, lr=0.01, overlap_forward=overlap_forward)
        ddp(torch.ones(2, 8)).sum().backward()
        comm.barrier()
        if overlap_forward and comm.rank == 1:
            time.sleep(LATE_S)
        optimizer.step()
        optimizer.zero_grad()
        sum(1e3 * param.sum() for param in ddp.parameters()).backward()
        weights.append({name: bits(param) for name, param in ddp.named_parameters()})
    return weights[0] == weights[1]


def test_what_cannot_overlap_is_refused(pool):
    assert pool.run(2, refusals) == [[True, True]] * 2


def refusals(comm):
    def make(stage, symmetric):
        ShardedAdamW(DataParallel(network(), comm, symmetric=symmetric), stage=stage, overlap_forward=True)

    stage_0 = message_of(ValueError, make, 0, True)
    ordinary = message_of(ValueError, make, 1, False)
    return ["stages 1 and 2" in stage_0, "symmetric=True" in ordinary]
