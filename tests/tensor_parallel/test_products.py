"""Products with communication against those of the whole, on one rank; overlapped and not, bit for bit."""

import contextlib

import pytest
import torch

from pycomm.errors import MismatchError
from pycomm.tensor_parallel.products import all_gather_matmul, copy_matmul, matmul_all_reduce, matmul_reduce_scatter
from pycomm.tensor_parallel.shards import shard_sizes
from tests.tensor_parallel.helpers import Seen

WORLD_SIZES = [1, 2, 3, 4]


def tensor(*shape, seed, dtype=torch.float32):
    """Integers from -2 to 2: all sums below are exact in fp32, so that any order gives the same bits."""
    generator = torch.Generator().manual_seed(seed)
    return here(torch.randint(-2, 3, shape, generator=generator, device="cpu").to(dtype))


def here(tensor):
    """On the default device, which tests/gpu sets."""
    return tensor.to(torch.get_default_device())


def part(whole, comm, dim):
    return whole.split(shard_sizes(whole.shape[dim], comm.world_size), dim)[comm.rank].clone()


def with_gradients(out, grad, *inputs):
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def check_all_gather(comm, lead, rows, k, n, overlap):
    x, weight, grad = tensor(*lead, rows, k, seed=1), tensor(n, k, seed=2), tensor(*lead, rows, n, seed=3)
    # Every rank has its own weight: its columns of the whole product.
    mine = (weight + comm.rank).requires_grad_()
    shard = part(x, comm, -2).requires_grad_()
    got = with_gradients(all_gather_matmul(shard, mine, comm, overlap=overlap), grad, shard, mine)
    whole = x.requires_grad_()
    want_out, _, want_weight = with_gradients(whole @ mine.T, grad, whole, mine)
    want_x = sum(grad @ (weight + r) for r in range(comm.world_size))
    assert torch.equal(got[0], want_out)
    assert torch.equal(got[1], part(want_x, comm, -2))
    assert torch.equal(got[2], want_weight)
    return True


def check_reduce(comm, lead, rows, k, n, overlap):
    x, weight, grad = tensor(*lead, rows, k, seed=1), tensor(n, k, seed=2), tensor(*lead, rows, n, seed=3)
    shards = [part(t, comm, -1).requires_grad_() for t in (x, weight)]
    want = with_gradients(x.requires_grad_() @ weight.requires_grad_().T, grad, x, weight)
    got = with_gradients(matmul_all_reduce(*shards, comm, overlap=overlap), grad, *shards)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], part(want[1], comm, -1))
    assert torch.equal(got[2], part(want[2], comm, -1))
    got = with_gradients(matmul_reduce_scatter(*shards, comm, overlap=overlap), part(grad, comm, -2), *shards)
    assert torch.equal(got[0], part(want[0], comm, -2))
    assert torch.equal(got[1], part(want[1], comm, -1))
    assert torch.equal(got[2], part(want[2], comm, -1))
    return True


def check_copy(comm, lead, rows, k, n, overlap):
    x, weight, grad = tensor(*lead, rows, k, seed=1), tensor(n, k, seed=2), tensor(*lead, rows, n, seed=3)
    bias = tensor(n, seed=4)
    whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
    want = with_gradients(torch.nn.functional.linear(*whole), grad, *whole)
    shards = [x.clone().requires_grad_(), *(part(t, comm, 0).requires_grad_() for t in (weight, bias))]
    out = copy_matmul(shards[0], shards[1], comm, shards[2], overlap=overlap)
    got = with_gradients(out, part(grad, comm, -1), *shards)
    assert torch.equal(got[0], part(want[0], comm, -1))
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], part(want[2], comm, 0))
    assert torch.equal(got[3], part(want[3], comm, 0))
    return True


SHAPES = [((), 12, 8, 6), ((), 10, 7, 5), ((3,), 7, 6, 10), ((2, 2), 5, 9, 4), ((), 2, 3, 2), ((4,), 1, 4, 1)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("check", [check_all_gather, check_reduce, check_copy])
def test_results_and_gradients_are_those_of_the_whole(pool, world_size, check):
    assert pool.run(world_size, every_case, check.__name__) == [True] * world_size


def every_case(comm, name):
    return all(globals()[name](comm, *shape, overlap) for shape in SHAPES for overlap in (True, False))


def bits_of(comm, overlap):
    """Everything the four operators compute from random numbers, where the order of a sum would show."""
    generator = torch.Generator().manual_seed(comm.rank)

    def draw(*shape, generator=generator):
        return here(torch.randn(*shape, generator=generator, device="cpu"))

    results = []
    for lead in ((), (3,)):
        x, weight = draw(*lead, 23, 16), draw(24, 16)
        for operator in (all_gather_matmul, matmul_reduce_scatter, matmul_all_reduce, copy_matmul):
            inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            out = operator(*inputs, comm, overlap=overlap)
            grad = draw(*out.shape, generator=torch.Generator().manual_seed(5))
            results += with_gradients(out, grad, *inputs)
    return [t.cpu().numpy().tobytes() for t in results]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_overlap_does_not_change_a_bit(pool, world_size):
    assert pool.run(world_size, bits_of, True) == pool.run(world_size, bits_of, False)


def ragged(comm, rows):
    """Any number of rows on any rank, growing and shrinking from call to call; also where only x needs a gradient."""
    for counts in rows:
        x, grad = tensor(sum(counts), 5, seed=sum(counts)), tensor(sum(counts), 3, seed=8)
        weight = tensor(3, 5, seed=9)
        shard = x.split(counts)[comm.rank].clone().requires_grad_()
        want_x = (comm.world_size * grad @ weight).split(counts)[comm.rank]
        for needed in ((shard,), (shard, weight.clone().requires_grad_())):
            out = all_gather_matmul(shard, needed[-1] if len(needed) == 2 else weight, comm)
            assert torch.equal(out, x @ weight.T), counts
            found = torch.autograd.grad(out, needed, grad)
            assert torch.equal(found[0], want_x), counts
            assert len(found) == 1 or torch.equal(found[1], grad.T @ x), counts
    return True


def test_rows_of_any_number(pool):
    assert pool.run(3, ragged, [[1, 1, 1], [0, 9, 2], [300, 1, 0], [2, 2, 1], [0, 0, 2000]]) == [True] * 3


def half_precision(comm):
    """Products of small integers are exact, and so are their fp32 sums: one rounding, at the end."""
    n = comm.world_size
    x, weight = tensor(6, 64 * n, seed=1), tensor(4, 64 * n, seed=2)
    shards = [part(t, comm, 1).bfloat16() for t in (x, weight)]
    partials = torch.stack([a @ b.T for a, b in zip(x.chunk(n, 1), weight.chunk(n, 1), strict=True)])
    want = partials.bfloat16().float().sum(0).bfloat16()
    return torch.equal(matmul_all_reduce(*shards, comm), want) and torch.equal(
        matmul_reduce_scatter(*shards, comm), part(want, comm, 0)
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_half_precision_sums_round_once(pool, world_size):
    assert pool.run(world_size, half_precision) == [True] * world_size


def mismatch(comm, operator):
    function = {f.__name__: f for f in (all_gather_matmul, matmul_all_reduce, matmul_reduce_scatter)}[operator]
    messages = []
    for other in ({"k": 6}, {"rows": 9}, {"rows": 4000}, {"dtype": torch.float64}):
        sizes = {"k": 5, "rows": 8, "dtype": torch.float32} | (other if comm.rank == 1 else {})
        if "k" in other and operator != "all_gather_matmul":
            continue  # partial products may have different depth
        if "rows" in other and operator == "all_gather_matmul":
            continue  # rows may differ
        x, weight = torch.ones(sizes["rows"], sizes["k"]), torch.ones(4, sizes["k"])
        try:
            function(x.to(sizes["dtype"]), weight.to(sizes["dtype"]), comm)
            messages.append("nothing raised")
        except MismatchError as error:
            messages.append(error.calls[1])
    x, weight = torch.ones(8, 4), torch.ones(2, 4)
    assert function(x, weight, comm).sum() > 0, "the communicator goes on"
    return messages


def test_different_shapes_on_two_ranks_are_named_on_both(pool):
    want = {
        "all_gather_matmul": ["float32[1, 8, 6]", "float64[1, 8, 5]"],
        "matmul_all_reduce": ["float32[1, 9, 4]", "float32[1, 4000, 4]", "float64[1, 8, 4]"],
        "matmul_reduce_scatter": ["float32[1, 9, 4]", "float32[1, 4000, 4]", "float64[1, 8, 4]"],
    }
    for operator, calls in want.items():
        assert pool.run(2, mismatch, operator) == [[f"{operator}({call})" for call in calls]] * 2


def different_operators(comm):
    x, weight = torch.ones(4, 4), torch.ones(4, 4)
    try:
        (matmul_all_reduce if comm.rank == 0 else all_gather_matmul)(x, weight, comm)
    except MismatchError as error:
        return error.calls
    return None


def test_different_operators_on_two_ranks_are_named(pool):
    calls = {0: "matmul_all_reduce(float32[1, 4, 4])", 1: "all_gather_matmul(float32[1, 4, 4])"}
    assert pool.run(2, different_operators) == [calls] * 2


def test_what_does_not_fit_is_told(pool):
    assert pool.run(1, misfit) == ["x (2, 3) torch.float32 does not fit weight (4, 2) torch.float32"]


def misfit(comm):
    try:
        matmul_all_reduce(torch.ones(2, 3), torch.ones(4, 2), comm)
    except ValueError as error:
        return str(error).partition(":")[0]
    return None


def watched_and_not(comm):
    """A dispatch mode sees operators; without one calls take the short way. The results are the same."""
    x, weight, bias = tensor(6, 4, seed=1), tensor(4, 4, seed=2), tensor(4, seed=3)
    names = []
    for operator in (all_gather_matmul, matmul_reduce_scatter, matmul_all_reduce, copy_matmul):
        found = []
        for mode in (contextlib.nullcontext(), Seen()):
            inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
            with mode:
                out = operator(inputs[0], inputs[1], comm, inputs[2])
                found.append(with_gradients(out, tensor(*out.shape, seed=4), *inputs))
            out += 1  # a result is the caller's
            with torch.no_grad():
                assert torch.equal(operator(*inputs[:2], comm, inputs[2]), out - 1)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), operator
        names += [name for name in mode.names if name.startswith("pycomm")]
    return names


def test_tracers_see_operators_and_others_get_the_same_results(pool):
    names = [
        "pycomm.all_gather_matmul.default", "pycomm.all_gather_matmul_backward.default",
        "pycomm.matmul_reduce_scatter.default", "pycomm.matmul_reduce_scatter_backward.default",
        "pycomm.matmul_all_reduce.default", "pycomm.matmul_all_reduce_backward.default",
        "pycomm.copy_matmul.default", "pycomm.copy_matmul_backward.default",
    ]  # fmt: skip
    assert pool.run(2, watched_and_not) == [names] * 2


def bias_once(comm, lead):
    """The bias of sums over ranks; its gradient has the same bits on every rank, though they visit rows differently."""
    x, weight, bias = torch.zeros(*lead, 7, 4), torch.zeros(3, 4), torch.tensor([1.0, 2.0, 4.0]).requires_grad_()
    for operator in (matmul_all_reduce, matmul_reduce_scatter, all_gather_matmul, copy_matmul):
        out = operator(x, weight, comm, bias)
        assert torch.equal(out, bias.expand_as(out)), operator
    scattered = matmul_reduce_scatter(x, weight, comm, bias)
    generator = torch.Generator().manual_seed(1)
    grad = part(torch.randn(*lead, 7, 3, generator=generator), comm, -2)
    (found,) = torch.autograd.grad(scattered, bias, grad)
    return found.tolist()


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_bias_is_added_once(pool, world_size, lead):
    ranks = pool.run(world_size, bias_once, lead)
    assert all(rank == ranks[0] for rank in ranks)
    whole = torch.randn(*lead, 7, 3, generator=torch.Generator().manual_seed(1)).flatten(0, -2).double().sum(0)
    # 14 terms at most, none above 4: 13 additions, each of a relative error of 2 ** -24 of a sum below 56.
    assert (torch.tensor(ranks[0]).double() - whole).abs().max() <= 13 * 56 * 2.0**-24


def autocast(comm):
    """Products in bf16, gradients of fp32 parameters in fp32, as of nn.Linear."""
    x, weight, bias = (t.requires_grad_() for t in (tensor(4, 6, seed=1), tensor(5, 6, seed=2), tensor(5, seed=3)))
    found = []
    for operator in (copy_matmul, matmul_all_reduce, matmul_reduce_scatter, all_gather_matmul):
        with torch.autocast("cpu", torch.bfloat16):
            out = operator(x, weight, comm, bias)
        found.append(out.dtype)
        found += [g.dtype for g in torch.autograd.grad(out.sum(), (x, weight, bias))]
    return found == [torch.bfloat16, *[torch.float32] * 3] * 4


def test_autocast(pool):
    assert pool.run(2, autocast) == [True] * 2


def second_gradient(comm):
    x, weight = torch.ones(4, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    raised = []
    for operator in (all_gather_matmul, matmul_reduce_scatter, matmul_all_reduce, copy_matmul):
        try:
            (first,) = torch.autograd.grad(operator(x, weight, comm).square().sum(), x, create_graph=True)
            torch.autograd.grad(first.sum(), weight)
        except NotImplementedError:
            raised.append(operator.__name__)
        comm.barrier()
    return raised


def test_a_second_gradient_is_refused(pool):
    names = ["all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce", "copy_matmul"]
    assert pool.run(2, second_gradient) == [names] * 2


def shared_names(comm):
    from torch.profiler import ProfilerActivity, profile

    matmul_all_reduce(torch.ones(2, 2), torch.ones(2, 2), comm)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        matmul_all_reduce(torch.ones(2, 2, requires_grad=True), torch.ones(2, 2), comm)
    names = {event.name for event in profiled.events()}
    return {"pycomm::matmul_all_reduce", "pycomm::wait", "pycomm::sum"} <= names


def test_profiles_name_what_happens(pool):
    assert pool.run(2, shared_names) == [True] * 2
