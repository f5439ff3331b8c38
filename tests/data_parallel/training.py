"""A model of a few norm blocks, and training loops over it, for the tests of sharding and clipping."""

import torch
from torch import nn

import pycomm
from pycomm.data_parallel import DataParallel, ShardedAdamW
from tests.data_parallel.helpers import bits, seeded

FEATURES, CLASSES, ROWS = 40, 7, 6  # ROWS: of one rank's micro-batch
NUM_STEPS = 20
MAX_NORM = 0.5  # less than the norms of the first steps, so that clipping does something


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """16,917 parameters: one of 9 norm blocks and a part of one, some of less than a block, one of none."""
    layers = nn.Linear(FEATURES, 240), nn.Tanh(), nn.Linear(240, 24), nn.Tanh(), nn.Linear(24, CLASSES)
    model = nn.Sequential(*layers)
    model.register_parameter("unseen", nn.Parameter(torch.zeros(0, 3), requires_grad=False))
    return seeded(model).to(dtype)


def rows(rank: int, step: int, micro_batch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10_000 * step + 100 * micro_batch + rank)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


def loss_on(model: nn.Module, rank: int, step: int, micro_batch: int = 0) -> torch.Tensor:
    x, target = rows(rank, step, micro_batch)
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), target) * 4


def train(
    comm,
    stage,
    *,
    num_steps=NUM_STEPS,
    micro_batches=1,
    synchronise_all=False,
    dtype=torch.float32,
    max_norm=MAX_NORM,
    **options,
):
    """The wrapper, its optimizer and the norms after training."""
    ddp = DataParallel(network(dtype), comm, **options)
    optimizer = ShardedAdamW(ddp, lr=0.01, stage=stage)
    norms = []
    for step in range(num_steps):
        optimizer.zero_grad()
        for micro_batch in range(micro_batches):
            if micro_batch + 1 < micro_batches and not synchronise_all:
                with ddp.no_sync():
                    (loss_on(ddp, comm.rank, step, micro_batch) / micro_batches).backward()
            else:
                (loss_on(ddp, comm.rank, step, micro_batch) / micro_batches).backward()
        if max_norm is not None:
            norms.append(pycomm.clip_grad_norm_(ddp, max_norm))
        optimizer.step()
    return ddp, optimizer, norms


def weight_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(param) for name, param in model.named_parameters()}
