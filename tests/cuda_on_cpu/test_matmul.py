"""Overlapped products: the driver that GPUs get, run in orders drawn from seeds, against plain products."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from tests.cuda_on_cpu.kernels import Address
from tests.cuda_on_cpu.test_collectives import NUM_SEEDS

GATHER, SCATTER, ALL_REDUCE = range(3)
WORLDS = [1, 2, 3, 4, 8]
IN, OUT = 5, 3


class Capacity(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "shard_rows", "input_row_bytes", "output_row_bytes")]


class Tensors(ctypes.Structure):
    _fields_ = [("x", Address), ("weight", Address), ("out", Address)]


@dataclass
class Call:
    """One call's tensors, by rank, of whole numbers: float32 sums of them are exact, whatever their order."""

    op: int
    rows: Sequence[int]
    xs: list[np.ndarray]
    weights: list[np.ndarray]
    outs: list[np.ndarray]
    transposed: bool = False  # how weights lie
    one_by_one: bool = False

    @staticmethod
    def random(op: int, rows: Sequence[int], seed: int, *, transposed: bool = False, one_by_one: bool = False) -> Call:
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.integers(-9, 10, shape).astype(np.float32)  # noqa: E731
        total = sum(rows)
        xs = [draw(count if op == GATHER else total, IN) for count in rows]
        out_rows = rows if op == SCATTER else [total] * len(rows)
        outs = [np.full((count, OUT), np.nan, np.float32) for count in out_rows]
        weights = [draw(IN, OUT) if transposed else draw(OUT, IN) for _ in rows]
        return Call(op, rows, xs, weights, outs, transposed, one_by_one)

    def wanted(self) -> list[np.ndarray]:
        weights_t = self.weights if self.transposed else [weight.T for weight in self.weights]
        if self.op == GATHER:
            return [np.concatenate(self.xs) @ weight_t for weight_t in weights_t]
        total = sum(x @ weight_t for x, weight_t in zip(self.xs, weights_t, strict=True))
        firsts = np.cumsum([0, *self.rows])
        parts = [total[firsts[rank] : firsts[rank + 1]] for rank in range(len(self.rows))]
        return parts if self.op == SCATTER else [total] * len(self.rows)

    def assert_right(self) -> None:
        for got, wanted in zip(self.outs, self.wanted(), strict=True):
            np.testing.assert_array_equal(got, wanted)


class Matmuls:
    def __init__(
        self, library: ctypes.CDLL, world: int, *, together: bool, mapped: bool, pieces: int = 1, lanes: int = 8
    ) -> None:
        self.library, self.world, self.together = library, world, together
        capacity = Capacity(9 * world, 9, IN * 4, OUT * 4)
        flags = (int(together), int(mapped), pieces, lanes)
        self.pointer = Address(library.matmul_new(world, *flags, ctypes.byref(capacity)))

    def enqueue(self, call: Call, ranks: Sequence[int] | None = None) -> None:
        """Of all ranks, or of some objects that have one rank each."""
        tensors = [
            Tensors(*(array.ctypes.data for array in arrays))
            for arrays in zip(call.xs, call.weights, call.outs, strict=True)
        ]
        groups = [tensors] if self.together else [[one] for one in tensors]
        rows = (ctypes.c_int64 * len(call.rows))(*call.rows)
        for index, group in enumerate(groups):
            if ranks is not None and index not in ranks:
                continue
            sizes = (ctypes.c_int64(IN), ctypes.c_int64(OUT), int(call.transposed), int(call.one_by_one))
            array = (Tensors * len(group))(*group)
            check(
                self.library.matmul_enqueue(
                    self.pointer, index, call.op, rows, len(call.rows), *sizes, array, len(group)
                )
            )

    def run(self, seed: int) -> None:
        assert self.library.matmul_run(ctypes.c_uint32(seed)) == 0, "streams wait for what never comes"

    def wait(self, index: int, timeout_s: float) -> None:
        check(self.library.matmul_wait(self.pointer, index, ctypes.c_double(timeout_s)))


def check(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(message.decode())


@pytest.fixture
def make_matmuls(library: ctypes.CDLL) -> Iterator[Callable[..., Matmuls]]:
    made: list[Matmuls] = []

    def make(*args: int, **options: int) -> Matmuls:
        made.append(Matmuls(library, *args, **options))
        return made[-1]

    yield make
    for matmuls in made:
        library.matmul_free(matmuls.pointer)


def uneven(world: int, seed: int) -> list[int]:
    return [(4, 0, 9, 1, 7)[(rank + seed) % 5] for rank in range(world)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("together", "mapped"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize(("pieces", "lanes"), [(1, 8), (3, 2)])
def test_calls_follow_each_other(
    make_matmuls: Callable[..., Matmuls], world: int, together: bool, mapped: bool, pieces: int, lanes: int
) -> None:
    """Enqueued one behind the other without a look at the host, so fast ranks run ahead as far as flags let them."""
    for seed in range(NUM_SEEDS):
        matmuls = make_matmuls(world, together=together, mapped=mapped, pieces=pieces, lanes=lanes)
        order = np.random.default_rng(seed).permutation([GATHER, SCATTER, ALL_REDUCE] * 2)
        calls = [
            Call.random(
                int(op), uneven(world, seed + i), 10 * seed + i, transposed=(seed + i) % 2 == 1, one_by_one=i % 3 == 2
            )
            for i, op in enumerate(order)
        ]
        for call in calls:
            matmuls.enqueue(call)
        matmuls.run(seed)
        for call in calls:
            call.assert_right()


@pytest.mark.parametrize(("together", "mapped"), [(False, True), (False, False)])
def test_gathered_rows_can_be_read_after_the_call(
    make_matmuls: Callable[..., Matmuls], together: bool, mapped: bool
) -> None:
    rows = [4, 0, 9]
    matmuls = make_matmuls(3, together=together, mapped=mapped, pieces=2)
    calls = [Call.random(op, rows, seed) for seed, op in enumerate((SCATTER, GATHER, ALL_REDUCE))]
    for call in calls:  # others after it leave its rows alone
        matmuls.enqueue(call)
    matmuls.run(0)
    firsts = np.cumsum([0, *rows])
    for rank in range(3):
        address = matmuls.library.matmul_gathered(matmuls.pointer, rank)
        gathered = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (sum(rows), IN))
        for peer in {0, 1, 2} - {rank}:
            np.testing.assert_array_equal(gathered[firsts[peer] : firsts[peer + 1]], calls[1].xs[peer])


def test_a_rank_that_does_not_come_is_named_and_nothing_stays_blocked(make_matmuls: Callable[..., Matmuls]) -> None:
    matmuls = make_matmuls(3, together=False, mapped=True)
    matmuls.enqueue(Call.random(GATHER, [2, 2, 2], 0))
    matmuls.run(0)
    call = Call.random(ALL_REDUCE, [2, 2, 2], 1)
    matmuls.enqueue(call, ranks=[0, 1])
    with pytest.raises(RuntimeError, match=r"call 2 is not over after 0.0.* nothing came from rank\(s\) 2$"):
        matmuls.wait(0, 0.01)
    with pytest.raises(RuntimeError, match=r"nothing came from rank\(s\) 2$"):
        matmuls.wait(1, 0.01)
    matmuls.run(1)
    with pytest.raises(RuntimeError, match="earlier call failed"):
        matmuls.enqueue(call)


def test_calls_that_do_not_fit_are_refused(make_matmuls: Callable[..., Matmuls]) -> None:
    matmuls = make_matmuls(2, together=True, mapped=True)
    with pytest.raises(RuntimeError, match="20 rows, 10 of one rank, .* larger than the workspace"):
        matmuls.enqueue(Call.random(GATHER, [10, 10], 0))
    with pytest.raises(RuntimeError, match="rows of 3 ranks"):
        matmuls.enqueue(Call.random(GATHER, [1, 1, 1], 0))
    matmuls.run(0)
