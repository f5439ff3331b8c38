"""The order of the data: a permutation of blocks that depends on seed, step and position alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycomm.pretrain.sampler import Sampler, permute


def numbered(count: int) -> np.ndarray:
    """Tokens that say where they stand."""
    return np.arange(count, dtype=np.uint16)


@given(size=st.integers(1, 400), key=st.binary(min_size=1, max_size=32))
def test_permute_visits_each_index_once(size: int, key: bytes) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(size=st.integers(1, 1 << 40), key=st.binary(min_size=1, max_size=32), data=st.data())
def test_permute_stays_in_range_for_large_sizes(size: int, key: bytes, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    assert 0 <= permute(index, size, key) < size


def test_permute_refuses_an_index_outside() -> None:
    for index in (-1, 7):
        with pytest.raises(ValueError, match="outside"):
            permute(index, 7, b"key")


def test_permute_is_fixed_for_all_time() -> None:
    # A run that is resumed under a later version must see the order it began with.
    assert [permute(index, 10, b"pycomm") for index in range(10)] == [7, 5, 1, 0, 4, 3, 2, 6, 8, 9]


@given(num_tokens=st.integers(40, 2000), seq=st.integers(1, 19), batch=st.integers(1, 9), seed=st.integers(0, 5))
def test_an_epoch_visits_each_block_once(num_tokens: int, seq: int, batch: int, seed: int) -> None:
    sampler = Sampler(numbered(num_tokens), seq, batch, seed)
    epoch = [divmod(position, batch) for position in range(sampler.num_blocks)]
    starts = sorted(sampler.start(1 + step, position) for step, position in epoch)
    assert {later - earlier for earlier, later in itertools.pairwise(starts)} <= {seq}
    assert starts[0] >= 0
    assert starts[-1] + seq + 1 <= num_tokens


@given(batch=st.sampled_from([4, 8, 12]), world=st.sampled_from([1, 2, 4]), step=st.integers(1, 50))
def test_shares_of_the_ranks_make_up_the_batch(batch: int, world: int, step: int) -> None:
    sampler = Sampler(numbered(3000), 16, batch, 3)
    whole, _ = sampler.batch(step, range(batch))
    share = batch // world
    parts = [sampler.batch(step, range(rank * share, (rank + 1) * share))[0] for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_targets_are_the_next_tokens() -> None:
    tokens, targets = Sampler(numbered(500), 16, 4, 0).batch(7, range(4))
    assert tokens.shape == targets.shape == (4, 16)
    assert (targets == tokens + 1).all()


def test_seed_and_epoch_change_the_order() -> None:
    first, other_seed = (Sampler(numbered(2000), 16, 8, seed) for seed in (0, 1))
    order = [first.start(1 + index // 8, index % 8) for index in range(first.num_blocks)]
    assert order != sorted(order)
    assert order != [other_seed.start(1 + index // 8, index % 8) for index in range(first.num_blocks)]
    later = [index + first.num_blocks for index in range(first.num_blocks)]
    assert order != [first.start(1 + index // 8, index % 8) for index in later]


def test_too_few_tokens_are_told() -> None:
    Sampler(numbered(17), 16, 1, 0)
    with pytest.raises(ValueError, match="too few"):
        Sampler(numbered(16), 16, 1, 0)
