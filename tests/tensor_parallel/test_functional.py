"""The conjugate operators: values, gradients, and that each is what torch.library expects of an operator."""

import pytest
import torch

from pycomm.tensor_parallel import (
    all_gather,
    copy_to_ranks,
    functional,
    gather_from_ranks,
    library,
    reduce_from_ranks,
    reduce_scatter,
    scatter_to_ranks,
    vocabulary,
)
from pycomm.tensor_parallel.products import operators
from tests.tensor_parallel.helpers import part

WORLD_SIZES = [1, 2, 3, 4]


def whole(seed, size=5, dim=1):
    """Small integers: every sum of them is exact."""
    shape = [2, 3, 4]
    shape[dim] = size
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def pairs(comm, dim, size):
    """Forward of each and its gradient, all ranks' inputs being known here."""
    n = comm.world_size
    inputs = [whole(r, size, dim) for r in range(n)]
    grads = [whole(100 + r, size, dim) for r in range(n)]
    mine, grad = inputs[comm.rank], grads[comm.rank]

    def check(operator, x, upstream, want, want_grad, **settings):
        x = x.clone().requires_grad_()
        out = operator(x, comm, **settings)
        (got_grad,) = torch.autograd.grad(out, x, upstream)
        assert torch.equal(out, want), operator
        assert torch.equal(got_grad, want_grad), operator

    check(copy_to_ranks, mine, grad, mine, sum(grads))
    check(reduce_from_ranks, mine, grads[0], sum(inputs), grads[0])
    everything = inputs[0]
    check(scatter_to_ranks, everything, part(grads[0], comm, dim), part(everything, comm, dim), grads[0], dim=dim)
    check(gather_from_ranks, part(everything, comm, dim), grads[0], everything, part(grads[0], comm, dim), dim=dim)
    check(all_gather, part(everything, comm, dim), grad, everything, part(sum(grads), comm, dim), dim=dim)
    check(reduce_scatter, mine, part(grads[0], comm, dim), part(sum(inputs), comm, dim), grads[0], dim=dim)
    return True


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_operator_and_its_conjugate(pool, world_size, dim):
    for size in (2, 5, 8):
        assert pool.run(world_size, pairs, dim, size) == [True] * world_size


def twice(comm):
    """The gradient of a gradient: d/dx of (d/dx of sum(copy(x)^3)) is 6 x, summed over ranks once more."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(copy_to_ranks(x, comm).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return first.tolist(), second.tolist()


def test_second_derivatives_of_a_copy(pool):
    assert pool.run(2, twice) == [([6.0, 24.0], [12.0, 24.0])] * 2


def check_operators(comm):
    """torch.library.opcheck: schema, fake kernel, autograd registration, tracing with static and dynamic shapes."""
    group = comm.key
    n = comm.world_size

    def x(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()

    sizes = [4] * n
    calls = [
        (functional._copy, (x(2, 4), group)),
        (functional._reduce, (x(2, 4), group)),
        (functional._gather, (x(2, 4), 1, sizes, group)),
        (functional._scatter, (x(2, 4 * n), 1, group)),
        (functional._all_gather, (x(2, 4), 1, sizes, group)),
        (functional._reduce_scatter, (x(2, 4 * n), 1, sizes, group)),
        (operators._all_gather_matmul, (x(4, 3), x(5, 3), x(5), sizes, True, group)),
        (operators._matmul_reduce_scatter, (x(4 * n, 3), x(5, 3), x(5), True, group)),
        (operators._matmul_all_reduce, (x(4, 3), x(5, 3), x(5), True, group)),
        (operators._copy_matmul, (x(4, 3), x(5, 3), x(5), True, group)),
    ]
    ids = torch.tensor([0, 2, 5])
    calls += [
        (vocabulary._token_losses, (x(3, 4), torch.tensor([0, 1, -100]), -100, 0.1, 0.1, group)),
        (vocabulary._lookup, (ids, x(4, 3), 0, 4 * n + 2, -1)),
    ]
    grad = x(4, 5).detach()
    alone = [
        (operators._all_gather_matmul_backward, (x(4 * n, 5), x(4, 3), x(5, 3), sizes, True, True, True, False, group)),
        (operators._matmul_reduce_scatter_backward, (grad, x(4 * n, 3), x(5, 3), True, True, False, True, group)),
        (operators._matmul_all_reduce_backward, (grad, x(4, 3), x(5, 3), True, False, True, True, group)),
        (operators._copy_matmul_backward, (grad, x(4, 3), x(5, 3), True, True, True, True, group)),
        (vocabulary._logits_gradient, (x(4), x(4, 3), x(4), torch.tensor([0, -1, 2, 1, 3 * n]), 0.1, 0.1)),
        (vocabulary._lookup_gradient, (x(3, 5), ids, 0, 4, -1)),
    ]
    calls += [
        (operator, tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in args)) for operator, args in alone
    ]
    assert {operator.operator.name() for operator, _ in calls} == library._library._op_defs, "every operator is checked"
    outcomes = {}
    for operator, args in calls:
        name = operator.operator.name()
        outcomes |= {
            f"{name}.{test}": outcome for test, outcome in torch.library.opcheck(operator.operator, args).items()
        }
        found = operator(*args)
        outcomes[f"{name} returns no view"] = (
            "SUCCESS" if not torch.Tensor._is_view(found if isinstance(found, torch.Tensor) else found[0]) else "VIEW"
        )
    return sorted(name for name, outcome in outcomes.items() if outcome != "SUCCESS")


def test_opcheck(pool):
    assert pool.run(2, check_operators) == [[]] * 2
