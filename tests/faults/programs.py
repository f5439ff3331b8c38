"""What ranks are busy with when a fault hits them: endless programs, one for each layer of the library.

A program is a generator: it builds what it needs, then makes one step a turn, the same on every rank. It notes the
members of each communicator that it makes, so that what an error says of a group's ranks can be read as ranks of the
world.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import pycomm
from pycomm import Communicator
from pycomm.models import gpt_stages, next_token_loss
from pycomm.pipeline import NAMES, Pipeline
from pycomm.pretrain import StepRecord, TrainState, build_state, checkpoint, train
from pycomm.pretrain.data import prepare
from pycomm.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from tests.data_parallel.helpers import loss_of, mlp
from tests.pipeline.helpers import model, on_this_rank, schedule_of
from tests.pretrain.helpers import small_config


@dataclass
class Job:
    """What a program is given.

    Attributes:
        comm: of all ranks.
        rng: equal on all ranks.
        folder: for files, the same on all ranks.
        meet: makes a communicator of all ranks by ``pycomm.init``.
        groups: name of a communicator -> the ranks of the world in it.
    """

    comm: Communicator
    rng: random.Random
    folder: Path
    meet: Callable[[], Communicator]
    groups: dict[str, list[int]] = field(default_factory=dict)

    def note(self, group: Communicator) -> None:
        """Remember who is in a group; collective in it."""
        ranks = torch.empty(group.world_size, dtype=torch.int64)
        group.all_gather(ranks, torch.tensor([self.comm.rank]))
        self.groups[group.name] = ranks.tolist()


Program = Callable[[Job], Iterator[None]]


def collectives(job: Job) -> Iterator[None]:
    """Every collective, on symmetric and on ordinary tensors, in calls that wait and in calls that do not."""
    n = job.comm.world_size
    while True:
        count = n * job.rng.choice((1, 100, 30_000))
        make = job.comm.empty if job.rng.random() < 0.5 else torch.empty
        whole, part = make(count).fill_(1), make(count // n).fill_(1)
        asynchronous, root = job.rng.random() < 0.5, job.rng.randrange(n)
        at_root = job.comm.rank == root
        works = [
            job.comm.all_reduce(whole, job.rng.choice(("sum", "avg", "max")), async_op=asynchronous),
            job.comm.reduce_scatter(part, whole, async_op=asynchronous),
            job.comm.all_gather(whole, part, async_op=asynchronous),
            job.comm.broadcast(whole, root, async_op=asynchronous),
            job.comm.gather(whole if at_root else None, part, root, async_op=asynchronous),
            job.comm.scatter(part, whole if at_root else None, root, async_op=asynchronous),
            job.comm.reduce(whole, root, async_op=asynchronous),
            job.comm.all_to_all(torch.empty(count), whole, async_op=asynchronous),
            job.comm.barrier(async_op=asynchronous),
        ]
        for work in works:
            if work is not None:
                work.wait()
        yield


def messages(job: Job) -> Iterator[None]:
    """A ring: exchanges in a batch, then messages that follow each other around."""
    after, before = (job.comm.rank + 1) % job.comm.world_size, (job.comm.rank - 1) % job.comm.world_size
    while True:
        count = job.rng.choice((1, 1000, 200_000))
        out, into = torch.ones(count), torch.empty(count)
        with job.comm.batch() as batch:
            batch.send(out, after)
            batch.recv(into, before)
        if job.comm.rank == 0:
            job.comm.send(out, after, tag=1)
        job.comm.recv(into, before, tag=1)
        if job.comm.rank != 0:
            job.comm.send(into, after, tag=1)
        yield


def split_groups(job: Job) -> Iterator[None]:
    """Two groups that overlap, the halves and the odd and even ranks: who waits for the victim is waited for itself."""
    halves, parity = job.comm.split(job.comm.rank // 2), job.comm.split(job.comm.rank % 2)
    assert halves is not None
    assert parity is not None
    for group in (halves, parity):
        job.note(group)
    while True:
        for group in (halves, parity, job.comm):
            for _ in range(job.rng.randint(0, 2)):
                group.all_reduce(torch.ones(500))
        yield


def births(job: Job) -> Iterator[None]:
    """Communicators and symmetric memory that are made and dropped again."""
    while True:
        group = job.comm.split(0 if job.rng.random() < 0.5 else job.comm.rank % 2)
        assert group is not None
        job.note(group)
        group.all_reduce(group.empty(1000).fill_(1))
        group.close()
        yield


def meetings(job: Job) -> Iterator[None]:
    """Rounds of ``init`` and ``close`` by the same processes, with a group of some ranks between."""
    job.groups[""] = job.groups["meeting"] = list(range(job.comm.world_size))  # "": inside init
    while True:
        with job.meet() as comm:
            comm.all_reduce(torch.ones(10))
            if job.rng.random() < 0.5:
                group = comm.split(comm.rank % 2)
                assert group is not None
                job.note(group)
                group.all_reduce(group.empty(100).fill_(1))
                group.close()
        yield


def data_parallel(job: Job) -> Iterator[None]:
    """Training steps of every ZeRO stage, with clipping and accumulation."""
    ddp = pycomm.DataParallel(mlp(), job.comm, bucket_mb=0.002)
    optimizer = pycomm.ShardedAdamW(ddp, lr=1e-3, stage=job.rng.randrange(3))
    while True:
        optimizer.zero_grad()
        if job.rng.random() < 0.5:
            with ddp.no_sync():
                loss_of(ddp, job.comm.rank).backward()
        loss_of(ddp, job.comm.rank).backward()
        pycomm.clip_grad_norm_(ddp, 1.0)
        optimizer.step()
        yield


def tensor_parallel(job: Job) -> Iterator[None]:
    """Forward and backward of two layers that are divided, with products that overlap their communication."""
    parallel = job.rng.random() < 0.5
    layers = nn.Sequential(
        ColumnParallelLinear(32, 64, job.comm, sequence_parallel=parallel),
        RowParallelLinear(64, 32, job.comm, sequence_parallel=parallel),
    )
    x = torch.ones(8, 32, requires_grad=True)
    while True:
        layers(x).sum().backward()
        yield


def pipeline(job: Job) -> Iterator[None]:
    """Steps of a pipeline, each rank one stage or two."""
    schedule = schedule_of(job.rng.choice(NAMES), job.comm.world_size)
    pipe = Pipeline(gpt_stages(model(), job.comm, schedule.rank_of), schedule, next_token_loss)
    while True:
        pipe.step(*on_this_rank(job.comm, schedule))
        yield


def mesh(job: Job) -> Iterator[None]:
    """Pipeline stages that are data parallel: a rank waits for others in two groups in turn."""
    pp = 2 if job.comm.world_size % 2 == 0 else 1
    axes = pycomm.Mesh(job.comm, dp=job.comm.world_size // pp, pp=pp)
    for group in (axes.dp, axes.pp):
        job.note(group)
    schedule = schedule_of("1f1b", pp)
    stages = gpt_stages(model(), axes.pp, schedule.rank_of, wrap=lambda module: pycomm.DataParallel(module, axes.dp))
    pipe = Pipeline(stages, schedule, next_token_loss)
    replicas = [stage.module for stage in stages]
    optimizers = [pycomm.ShardedAdamW(replica, lr=1e-3, stage=job.rng.randrange(3)) for replica in replicas]
    while True:
        pipe.step(*on_this_rank(axes.pp, schedule))
        pycomm.clip_grad_norm_(replicas, 1.0, axes)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield


def torch_distributed(job: Job) -> Iterator[None]:
    """torch's own DistributedDataParallel, collectives and messages on the back end "pycomm" (``comm``: its world)."""
    ddp = nn.parallel.DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    after, before = (job.comm.rank + 1) % job.comm.world_size, (job.comm.rank - 1) % job.comm.world_size
    while True:
        loss_of(ddp, job.comm.rank).backward()
        dist.all_reduce(torch.ones(1000), async_op=True).wait()
        received = torch.empty(100)
        operations = [dist.P2POp(dist.isend, torch.ones(100), after), dist.P2POp(dist.irecv, received, before)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        yield


def pretraining(job: Job) -> Iterator[None]:
    """The pretraining loop with its checkpoints, a few steps at a time, each time from the last checkpoint on."""
    config = small_config(steps=100_000, zero=job.rng.randrange(3))
    if job.comm.rank == 0:
        prepare(config, job.folder)
    job.comm.barrier()
    corpus = prepare(config, job.folder)
    state = build_state(job.comm, config)
    records: list[StepRecord] = []

    def save(state: TrainState) -> None:
        if job.comm.rank == 0:
            checkpoint.save(job.folder / "checkpoints", state, config, corpus.key)
        else:
            checkpoint.contribute(state)

    while True:
        records.clear()
        train(job.comm, config, corpus, state, on_step=records.append, save=save, stop=lambda: len(records) >= 2)
        job.comm.barrier()
        checkpoint.load(job.folder / "checkpoints" / "latest", job.comm, state)
        yield
