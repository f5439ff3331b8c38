"""Ranks, their signal pads and their memory, as the host code for GPUs makes them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from tests.cuda_on_cpu.kernels import Address, pointers


class Group:
    def __init__(self, library: ctypes.CDLL, world: int, timeout_s: float) -> None:
        self.library, self.world, self.pointer = library, world, Address()
        self.call("group_new", world, ctypes.c_double(timeout_s), ctypes.byref(self.pointer))

    def call(self, name: str, *args: object) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*args)
        if message is not None:
            raise RuntimeError(message.decode())

    def all_reduce(self, data: list[np.ndarray], ranks: int, blocks: int = 2) -> None:
        addresses = pointers([array.ctypes.data for array in data])
        self.call("group_all_reduce", self.pointer, ranks, blocks, ctypes.c_int64(len(data[0])), addresses)

    def add_one(self, data: np.ndarray) -> None:
        self.library.group_add_one(self.pointer, ctypes.c_void_p(data.ctypes.data))


@pytest.fixture
def group(library: ctypes.CDLL) -> Iterator[Group]:
    made = Group(library, 3, 0.003)
    yield made
    library.group_free(made.pointer)


def test_kernels_come_between_what_the_caller_does_before_and_after(group: Group) -> None:
    data = [np.full(1500, rank, np.float32) for rank in range(3)]
    group.add_one(data[0])
    for _ in range(2):
        group.all_reduce(data, 3)
        group.add_one(data[2])
    group.call("group_wait", group.pointer)
    first = 1 + 1 + 2
    for rank, array in enumerate(data):
        assert array[1] == 9
        assert array[0] == 3 * first + 1 + (rank == 2)


def test_a_rank_that_is_not_launched_is_named(group: Group) -> None:
    data = [np.ones(8, np.float32) for _ in range(3)]
    group.all_reduce(data, 2)
    with pytest.raises(RuntimeError, match=r"gave up after 0.003\d* s: rank \d waited for rank 2 \(block"):
        group.call("group_wait", group.pointer)


def test_an_aborted_group_does_nothing(group: Group) -> None:
    data = [np.ones(8, np.float32) for _ in range(3)]
    group.call("group_abort", group.pointer)
    group.call("group_all_reduce", group.pointer, 0, 2, ctypes.c_int64(8), pointers([0] * 3))
    group.library.matmul_run(0)
    group.all_reduce(data, 3)
    with pytest.raises(RuntimeError, match="the group was aborted"):
        group.call("group_wait", group.pointer)
    assert [array[0] for array in data] == [1, 1, 1]


def test_blocks_that_cannot_all_be_resident_are_refused(group: Group) -> None:
    data = [np.ones(8, np.float32) for _ in range(3)]
    group.library.set_num_multiprocessors(8)
    try:
        with pytest.raises(
            RuntimeError, match=r"3 kernels of 3 blocks .* runs 8 such blocks at a time; take at most 2 blocks"
        ):
            group.all_reduce(data, 3, blocks=3)
        group.all_reduce(data, 3, blocks=2)
        group.call("group_wait", group.pointer)
    finally:
        group.library.set_num_multiprocessors(1 << 20)
    assert data[0][0] == 3


@pytest.mark.parametrize("world", [0, 17])
def test_numbers_of_ranks_that_are_not_served(library: ctypes.CDLL, world: int) -> None:
    with pytest.raises(RuntimeError, match="1 to 16 are possible"):
        Group(library, world, 1.0)


def test_a_window_clears_this_ranks_part_and_keeps_its_owner(library: ctypes.CDLL) -> None:
    library.window.restype = ctypes.c_char_p
    parts = np.full((2, 64), 7, np.uint8)
    addresses, kept = (ctypes.c_void_p * 2)(*(part.ctypes.data for part in parts)), (ctypes.c_int * 2)()
    assert library.window(addresses, ctypes.c_size_t(48), kept) is None
    assert parts[0].tolist() == [7] * 64
    assert parts[1].tolist() == [0] * 48 + [7] * 16
    assert list(kept) == [2, 1]
