"""Scripts as people write them for torch.distributed, which must not be able to tell the back end from gloo.

Each function runs on every rank, in an initialised torch.distributed, and returns numbers.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor, all_reduce, reduce_scatter_tensor
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

WIDTH, CLASSES, BATCH, STEPS = 8, 4, 6, 3
Numbers = list[torch.Tensor]


class Classifier(nn.Module):
    """Two residual layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x + self.down(F.gelu(self.up(x))))
        return out


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, WIDTH, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def train(model: nn.Module, seed: int) -> Numbers:
    """Plain SGD; losses of every step, and the weights at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x, y in batches(seed):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(whole(parameter) for parameter in model.parameters())]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # type: ignore[operator]
    return full.detach().clone()  # type: ignore[no-any-return]


def ddp() -> Numbers:
    """Several buckets, accumulation under no_sync, a joined uneven end, unused parameters, buffers."""
    model = nn.Sequential(Classifier(), nn.BatchNorm1d(CLASSES))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.0005, find_unused_parameters=True)
    results = train(wrapped, dist.get_rank())
    (x, y), *_ = batches(dist.get_rank())
    wrapped.zero_grad()
    with wrapped.no_sync():
        F.cross_entropy(wrapped(x), y).backward()
    F.cross_entropy(wrapped(x + 1), y).backward()
    with wrapped.join():
        for _ in range(1 + dist.get_rank()):
            F.cross_entropy(wrapped(x), y).backward()
    return [*results, *(parameter.grad.clone() for parameter in model.parameters()), *model.buffers()]


def fsdp2() -> Numbers:
    model = Classifier()
    for layer in (model.up, model.down):
        fully_shard(layer)
    fully_shard(model)
    results = train(model, dist.get_rank())
    total = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return [*results, whole(total)]


def checkpoint() -> Numbers:
    """torch.distributed.checkpoint of a sharded model and its optimizer, loaded into a fresh one."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)

    def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Classifier()
        fully_shard(model)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = sharded()
    (x, y), *_ = batches(dist.get_rank())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    save(states, checkpoint_id=folder[0])
    fresh, fresh_optimizer = sharded()
    states = dict(zip(("model", "optimizer"), get_state_dict(fresh, fresh_optimizer), strict=True))
    load(states, checkpoint_id=folder[0])
    set_state_dict(fresh, fresh_optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    for loaded, saved in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(whole(loaded), whole(saved))
    return [whole(parameter) for parameter in fresh.parameters()]


def tensor_parallel() -> Numbers:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Classifier()
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return train(model, seed=0)


def two_dimensions() -> Numbers:
    """FSDP2 over one axis of a mesh, tensor parallel over the other: at four ranks, groups that cross."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = Classifier()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return train(model, seed=mesh["dp"].get_local_rank())


def pipeline() -> Numbers:
    """1F1B of torch.distributed.pipelining, one stage a rank."""
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    module = nn.Linear(WIDTH, WIDTH)
    stage = PipelineStage(module, rank, n, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=BATCH, loss_fn=F.mse_loss)
    x, target = torch.ones(BATCH, WIDTH), torch.zeros(BATCH, WIDTH)
    losses: Numbers = []
    for _ in range(STEPS):
        module.zero_grad()
        if rank == 0:
            schedule.step(x)
        elif rank == n - 1:
            schedule.step(target=target, losses=losses)
        else:
            schedule.step()
    return [*(loss.detach() for loss in losses), module.weight.grad, module.bias.grad]


def objects() -> Any:
    rank, n = dist.get_rank(), dist.get_world_size()
    mine = {"rank": rank, "text": "x" * (1000 * rank)}
    everyone: list[Any] = [None] * n
    dist.all_gather_object(everyone, mine)
    gathered: list[Any] | None = [None] * n if rank == n - 1 else None
    dist.gather_object(mine, gathered, dst=n - 1)
    received = [mine, rank]
    dist.broadcast_object_list(received, src=n - 1)
    scattered: list[Any] = [None]
    dist.scatter_object_list(scattered, [f"for {r}" for r in range(n)] if rank == 0 else None, src=0)
    passed = [None]
    if rank == 0:
        dist.send_object_list([("from", 0)], dst=n - 1)
    if rank == n - 1:
        dist.recv_object_list(passed, src=0)
    return everyone, gathered, received, scattered, passed


def overlapping_groups() -> Numbers:
    """Every pair of ranks is a group; each rank uses all of its own, and the order of ranks within one is free."""
    rank, n = dist.get_rank(), dist.get_world_size()
    pairs = {(a, b): dist.new_group([a, b]) for a in range(n) for b in range(a + 1, n)}
    results = []
    for (a, b), group in pairs.items():
        if rank not in (a, b):
            continue
        total = torch.tensor([10.0**rank])
        dist.all_reduce(total, group=group)
        copy_of_last = torch.tensor([float(rank)])
        dist.broadcast(copy_of_last, src=b, group=group)
        results += [total, copy_of_last]
    reversed_group = dist.new_group(list(reversed(range(n))), sort_ranks=False)
    places = [torch.zeros(1) for _ in range(n)]
    dist.all_gather(places, torch.tensor([float(rank)]), group=reversed_group)
    dist.destroy_process_group(reversed_group)
    return [*results, *places]


def point_to_point() -> Any:
    """Blocking and batched messages, tags out of order, any source, complex numbers."""
    rank, n = dist.get_rank(), dist.get_world_size()
    left, right = (rank - 1) % n, (rank + 1) % n
    incoming = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(4, 2)]
    outgoing = [torch.full_like(tensor, rank + 1) for tensor in incoming]
    operations = [
        dist.P2POp(function, tensor, peer, tag=tag)
        for function, tensors, peer in ((dist.isend, outgoing, right), (dist.irecv, incoming, left))
        for tag, tensor in enumerate(tensors)
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    first, second = torch.zeros(1), torch.zeros(1)
    sends = [dist.isend(torch.tensor([10.0 * tag + rank]), right, tag=tag) for tag in (1, 2)]
    receives = [dist.irecv(second, left, tag=2), dist.irecv(first, left, tag=1)]
    for work in sends + receives:
        work.wait()
    senders = []
    if rank == 0:
        for _ in range(n - 1):
            tensor = torch.zeros(1)
            source = dist.recv(tensor, tag=7)
            assert tensor.item() == source
            senders.append(source)
    else:
        dist.send(torch.tensor([float(rank)]), 0, tag=7)
    return incoming, first, second, sorted(senders)


def compiled() -> Numbers:
    """Functional collectives, and old-style ones that the compiler turns into them."""
    group = dist.group.WORLD
    n = dist.get_world_size()

    @torch.compile(fullgraph=True)
    def function(x: torch.Tensor) -> torch.Tensor:
        summed = all_reduce(x * 2, "sum", group)
        everyone = all_gather_tensor(summed + 1, 0, group)
        part = reduce_scatter_tensor(everyone, "sum", 0, group)
        dist.all_reduce(part)
        return part + 1

    x = torch.arange(4.0) + dist.get_rank()
    eager = torch.arange(4.0) * 2 * n + n * (n - 1)
    eager = (eager + 1) * n * n + 1
    result = function(x)
    assert torch.equal(result, eager), (result, eager)
    return [result]


@contextlib.contextmanager
def as_launched() -> Iterator[None]:
    """The variables by which Accelerate sees that torchrun started it, and no trace of what it found before."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    launched = {
        "RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launched.items():
            patch.setenv(name, str(value))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        yield


def accelerate() -> Numbers:
    """Hugging Face Accelerate prepares model, optimizer and loader, accumulates and gathers."""
    with as_launched():
        return _accelerate()


def _accelerate() -> Numbers:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == dist.get_world_size()
    model = Classifier()
    data = torch.utils.data.TensorDataset(torch.cat([x for x, _ in batches(0)]), torch.cat([y for _, y in batches(0)]))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()))
    return [torch.stack(losses), *(whole(parameter) for parameter in model.parameters())]


def trainer() -> Numbers:
    """A Hugging Face Trainer with a BERT of random weights that is never looked up anywhere."""
    with as_launched():
        return _trainer()


def _trainer() -> Numbers:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(32, (8,), generator=generator), "labels": torch.tensor(index % 2)}
        for index in range(16)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, max_steps=3, per_device_train_batch_size=2, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=data)
        assert arguments.world_size == dist.get_world_size()
        outcome = trainer.train()
        evaluated = trainer.evaluate(data)["eval_loss"]
    parameters = [whole(parameter) for parameter in trainer.model.parameters()]
    return [torch.tensor([outcome.training_loss, evaluated]), *parameters]
