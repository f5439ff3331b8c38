"""Twenty steps on several ranks and in one process that sees the whole batch: the same up to rounding (law 7).

A linear model under a quadratic loss, since there every bound can be derived: u = 2**-24, H is the Hessian x.T x / rows
of a step's whole batch, and e bounds the difference of the weights before the step.

* gradient: (|x w - t|).T |x| / rows with absolute values inside is its majorant M. An element is a sum over the rows of
  products with a dot product of IN terms: IN + rows + 6 roundings of M in each of the two evaluations, averaging
  included. A difference of weights moves it by H times that.
* loss: a sum of rows * OUT squares of dot products: 2 (IN + 2) + rows * OUT + 6 roundings of the same sum of absolute
  values; and |g| e + |H| e^2 / 2.
"""

import pytest
import torch
from torch import nn

from pycomm.data_parallel import DataParallel, ShardedAdamW
from tests.data_parallel.helpers import IN, OUT, batch, bits, loss_of, seeded

NUM_STEPS = 20
U = 2**-24
SGD_LR = 0.1
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
# eps is far above the gradients: AdamW divides rounding noise by rounding noise otherwise, and no bound holds.
ADAMW = {"lr": 0.002, "betas": BETAS, "eps": 1.0, "weight_decay": WEIGHT_DECAY}

every_world_size = pytest.mark.parametrize("world_size", [2, 3, 4])


def linear_model():
    return seeded(nn.Linear(IN, OUT, bias=False))


def train(comm, stage):
    """Weights, gradients and losses before each step, and the last weights. stage None: SGD."""
    ddp = DataParallel(linear_model(), comm)
    optimizer = (
        torch.optim.SGD(ddp.parameters(), lr=SGD_LR) if stage is None else ShardedAdamW(ddp, stage=stage, **ADAMW)
    )
    weight, found = ddp.module.weight, []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = loss_of(ddp, comm.rank, step)
        loss.backward()
        loss = loss.detach()
        comm.all_reduce(loss, op="avg")
        gradient = None if stage in (1, 2) else weight.grad.clone()  # no rank has all of it there
        found.append((weight.detach().clone(), gradient, loss))
        optimizer.step()
    return found, weight.detach().clone()


class OneProcess:
    """The same steps in this process, and how far from them others may be.

    Args:
        order: of the norm in which weights and gradients are compared.
    """

    def __init__(self, world_size, optimizer, order):
        self.world_size, self.order = world_size, order
        self.model = linear_model()
        self.optimizer = optimizer(self.model.parameters())
        self.e = 0.0  # how far apart the weights may be

    def distance(self, one, other):
        return float(torch.linalg.vector_norm(one.double() - other.double(), self.order))

    def step(self, number):
        """One step; returns weights before it, gradient, loss, and the bounds of the three."""
        x, target = (
            torch.cat(parts) for parts in zip(*(batch(r, number) for r in range(self.world_size)), strict=True)
        )
        weight = self.model.weight
        self.optimizer.zero_grad()
        loss = ((self.model(x) - target) ** 2).sum() / (2 * len(x))
        loss.backward()
        before = weight.detach().clone()
        wide, t, w = x.double(), target.double(), before.double()
        hessian = wide.T @ wide / len(x)
        residual = wide.abs() @ w.abs().T + t.abs()
        majorant = residual.T @ wide.abs() / len(x)
        self.rounding = 2 * (IN + len(x) + 6) * U * float(torch.linalg.vector_norm(majorant, self.order))
        # A row of the weights' difference times H: |.|_2 of a symmetric matrix, or its largest column sum.
        self.curvature = float(torch.linalg.matrix_norm(hessian, 2 if self.order == 2 else 1))
        gradient_bound = self.curvature * self.e + self.rounding
        terms = 2 * (IN + 2) + len(x) * OUT + 6
        distance = self.e * (1 if self.order == 2 else (IN * OUT) ** 0.5)  # as a 2-norm
        loss_bound = (
            float(weight.grad.double().norm()) * distance
            + float(torch.linalg.matrix_norm(hessian, 2)) * distance**2 / 2
            + 2 * terms * U * float((residual**2).sum()) / (2 * len(x))
        )
        self.optimizer.step()
        return (before, weight.grad.clone(), loss.detach()), (self.e, gradient_bound, loss_bound)


def compare(found, last, reference, grow):
    """``grow`` updates reference.e after each step."""
    for step in range(NUM_STEPS):
        (weight, gradient, loss), (weight_bound, gradient_bound, loss_bound) = reference.step(step)
        their_weight, their_gradient, their_loss = found[step]
        assert reference.distance(their_weight, weight) <= weight_bound, step
        if their_gradient is not None:
            assert reference.distance(their_gradient, gradient) <= gradient_bound, step
            assert gradient_bound < 1e-3 * float(torch.linalg.vector_norm(gradient, reference.order))
        assert abs(float(their_loss) - float(loss)) <= loss_bound, step
        assert loss_bound < 1e-3 * float(loss)
        grow(reference, weight)
    assert reference.distance(last, reference.model.weight.detach()) <= reference.e
    assert reference.e < 0.01 * reference.distance(reference.model.weight.detach(), linear_model().weight.detach())


@every_world_size
def test_sgd_has_the_losses_gradients_and_weights_of_one_process(pool, world_size):
    """A step multiplies an earlier difference by I - lr H, whose norm is at most 1 if lr times H's is at most 2.

    New are the gradients' rounding, times lr, and two roundings of the weight in each of the two evaluations.
    """

    def grow(reference, weight):
        assert SGD_LR * reference.curvature <= 2
        reference.e += SGD_LR * reference.rounding + 2 * 2 * U * float(weight.double().norm())

    ((found, last), *others) = pool.run(world_size, train, None)
    assert all(bits(other) == bits(last) for _, other in others)
    compare(found, last, OneProcess(world_size, lambda params: torch.optim.SGD(params, lr=SGD_LR), 2), grow)


@every_world_size
def test_adamw_has_the_losses_and_gradients_of_one_process(pool, world_size):
    """An update is m / (sqrt(v) + 1), with m and v averages of earlier gradients and of their squares.

    If each gradient is off by at most d, so is m, and so is sqrt(v), a norm; hence the update by at most
    d (1 + |m| / (sqrt(v) + 1)), where |m| <= C sqrt(v) (Cauchy-Schwarz). So e grows by lr (1 + C) d, with the largest d
    so far. New are fewer than 68 roundings of the update, lr C at most (test_sharded_adamw.py counts them), and 2 of
    the weight, in each of the two evaluations.
    """
    ratio = max(update_over_root(t) for t in range(1, NUM_STEPS + 1))
    largest_error = 0.0

    def grow(reference, weight):
        nonlocal largest_error
        largest_error = max(largest_error, reference.curvature * reference.e + reference.rounding)
        own = 2 * U * (68 * ratio * ADAMW["lr"] + 2 * float(weight.abs().max()))
        reference.e += ADAMW["lr"] * (1 + ratio) * largest_error + own

    for stage in (0, 1, 2):
        largest_error = 0.0
        ((found, last), *others) = pool.run(world_size, train, stage)
        assert all(bits(other) == bits(last) for _, other in others)
        reference = OneProcess(world_size, lambda params: torch.optim.AdamW(params, **ADAMW), torch.inf)
        compare(found, last, reference, grow)


def update_over_root(t):
    """The largest |m| / sqrt(v) after t steps, bias corrections included."""
    age = torch.arange(t, dtype=torch.float64)
    first, second = ((1 - beta) * beta**age / (1 - beta**t) for beta in BETAS)
    return float((first**2 / second).sum().sqrt())
