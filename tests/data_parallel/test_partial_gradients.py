"""``.grad`` under ZeRO: what would take this rank's part for the whole works on all of it, or raises."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import pycomm
from pycomm.data_parallel import DataParallel, ShardedAdamW
from pycomm.errors import PycommError
from tests.data_parallel.helpers import loss_of, message_of, mlp
from tests.data_parallel.training import loss_on, train, weight_bits

STAGES = (0, 1, 2)
both_divided_stages = pytest.mark.parametrize("stage", STAGES[1:])


@both_divided_stages
@pytest.mark.parametrize("world_size", [1, 2])
def test_norms_of_a_part_are_refused(pool, world_size, stage):
    """Catches torch's clipping that sees nothing (stage 2), or another norm on each rank (stage 1)."""
    for messages in pool.run(world_size, messages_of_norms, stage):
        for name, message in messages.items():
            assert "pycomm.clip_grad_norm_(ddp, max_norm)" in message, (name, message)
            assert "'0.weight'" in message, (name, message)


def messages_of_norms(comm, stage):
    ddp, _, _ = train(comm, stage, num_steps=1)
    loss_on(ddp, comm.rank, 1).backward()
    params = [param for param in ddp.parameters() if param.requires_grad]
    norms = {
        "torch's clipping": lambda: nn.utils.clip_grad_norm_(params, 1.0),
        "its largest entry": lambda: nn.utils.clip_grad_norm_(params, 1.0, norm_type=float("inf")),
        "the norm alone": lambda: nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]),
        "one by one": lambda: [p.grad.norm() for p in params if p.grad is not None],
        "written by hand": lambda: torch.stack([p.grad.detach().data.norm(2) for p in params if p.grad is not None]),
        "in another dtype": lambda: [p.grad.detach().double().pow(2).sum() for p in params if p.grad is not None],
        "pycomm's on parameters": lambda: pycomm.clip_grad_norm_(params, 1.0),
    }
    return {name: message_of(PycommError, norm) for name, norm in norms.items()}


def test_stage_1_shows_its_values(pool):
    """Catches that reading, changing or copying this rank's part is refused, too, or gives the refusing type."""
    assert pool.run(2, uses_of_partial_gradients) == [({torch.Tensor}, True)] * 2


def uses_of_partial_gradients(comm):
    """The types that come out, and whether values are those of gradient_parts()."""
    ddp, _, _ = train(comm, 1, num_steps=0)
    loss_on(ddp, comm.rank, 0).backward()
    param = ddp.module[0].weight
    ((begin, part),) = ddp.gradient_parts(param)
    nn.utils.clip_grad_value_([param], float(part.abs().max()) / 2)  # in place
    copies = [param.grad.flatten(), copy.deepcopy(param.grad), pickle.loads(pickle.dumps(param.grad)), param.grad * 1]
    mine = [copied.flatten()[begin : begin + part.numel()] for copied in copies]
    return {type(copied) for copied in copies}, all(torch.equal(values, part) for values in mine)


def test_stage_2_shows_no_values(pool):
    """Catches that code which changes or reads gradients finds zeros."""
    for messages, is_gone, is_zeroed in pool.run(2, uses_of_absent_gradients):
        assert all("gradient_parts" in message for message in messages), messages
        assert is_gone
        assert is_zeroed


def uses_of_absent_gradients(comm):
    """Errors of what needs values; whether zero_grad() of the plain module drops the averages, too."""
    ddp, optimizer, _ = train(comm, 2, num_steps=0)
    loss_on(ddp, comm.rank, 0).backward()
    params = [param for param in ddp.parameters() if param.requires_grad]
    uses = [
        lambda: nn.utils.clip_grad_value_(params, 1.0),
        lambda: params[0].grad * 2,
        lambda: params[0].grad.flatten()[0].item(),
        lambda: params[0].grad.clone(),
    ]
    messages = [message_of(PycommError, use) for use in uses]
    assert [p.grad.shape for p in params] == [p.shape for p in params]
    before = weight_bits(ddp)
    ddp.module.zero_grad()
    optimizer.step()  # nothing is there
    is_gone = weight_bits(ddp) == before
    for zero_grad in (optimizer.zero_grad, ddp.zero_grad):
        loss_on(ddp, comm.rank, 0).backward()
        zero_grad(set_to_none=False)
    optimizer.step()
    return messages, is_gone, weight_bits(ddp) == before


def test_stage_2_adds_up_backwards_that_pass_no_output_of_forward(pool):
    """Catches that autograd adds to what stands for the average of the first."""
    assert pool.run(2, sums_of_ones) == [True] * 2


def sums_of_ones(comm):
    ddp, _, _ = train(comm, 2, num_steps=0)
    for _ in range(3):
        sum(param.sum() for param in ddp.parameters() if param.requires_grad).backward()
    parts = [part for param in ddp.parameters() if param.requires_grad for _, part in ddp.gradient_parts(param)]
    return all(bool((part == 3).all()) for part in parts)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_grad_scaler_is_that_of_one_process(pool, world_size, stage, overlap):
    """Catches ranks that disagree about an overflow: one that skips its step, or scales differently from then on."""
    results = pool.run(world_size, scaled_training, stage, overlap)
    assert results == [results[0]] * world_size
    for scales, scaled, plain in results[0]:
        assert scales == [1024.0, 512.0, 512.0]  # the second step overflowed, in one element of one rank's gradient
        assert scaled == plain  # powers of two: no rounding


def scaled_training(comm, stage, overlap):
    """The weights with GradScaler, where a step overflows on the last rank, and without it and without that step.

    With unscale_() and clipping, and with step() alone.
    """
    return [scaled_run(comm, stage, overlap, clips) for clips in (True, False)]


def scaled_run(comm, stage, overlap, clips):
    scaled, plain = [DataParallel(mlp(), comm, overlap=overlap) for _ in range(2)]
    optimizers = [ShardedAdamW(ddp, lr=0.1, stage=stage) for ddp in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(3):
        optimizers[0].zero_grad()
        overflow = None
        if step == 1 and comm.rank == comm.world_size - 1:
            overflow = scaled.module[4].bias.register_hook(partial(with_infinity_last))
        scaler.scale(loss_of(scaled, comm.rank, step)).backward()
        if overflow is not None:
            overflow.remove()
        if clips:
            scaler.unscale_(optimizers[0])
            pycomm.clip_grad_norm_(scaled, 0.1)
        scaler.step(optimizers[0])
        scaler.update()
        scales.append(scaler.get_scale())
        if step != 1:
            optimizers[1].zero_grad()
            loss_of(plain, comm.rank, step).backward()
            if clips:
                pycomm.clip_grad_norm_(plain, 0.1)
            optimizers[1].step()
    return scales, weight_bits(scaled), weight_bits(plain)


def with_infinity_last(grad):
    changed = grad.clone()
    changed.view(-1)[-1] = float("inf")
    return changed
