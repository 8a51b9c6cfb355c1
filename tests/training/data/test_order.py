"""The order is a permutation, the same however it is asked for, and no worse than a shuffle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.order import order
from training.errors import UsageError

seeds = st.integers(-(2**63), 2**63)
epochs = st.integers(0, 2**31)


@given(seeds, epochs, st.integers(1, 3000))
def test_each_epoch_is_a_permutation(seed: int, epoch: int, count: int) -> None:
    assert np.array_equal(np.sort(order(seed, epoch, np.arange(count), count)), np.arange(count))


@given(seeds, epochs, st.integers(1, 500), st.data())
def test_the_order_does_not_depend_on_how_it_is_asked(seed: int, epoch: int, count: int, data: st.DataObject) -> None:
    whole = order(seed, epoch, np.arange(count), count)
    asked = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), dtype=np.int64)
    assert np.array_equal(order(seed, epoch, asked, count), whole[asked])
    cut = data.draw(st.integers(0, count))
    parts = [order(seed, epoch, part, count) for part in np.split(np.arange(count), [cut])]
    assert np.array_equal(np.concatenate(parts), whole)


@given(st.integers(2, 2**62), st.data())
@settings(max_examples=50)
def test_any_size_is_reached_at_once(count: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, count - 1))
    found = order(1, 2, np.array([position]), count)
    assert found.dtype == np.int64
    assert 0 <= found[0] < count


def test_seeds_and_epochs_differ() -> None:
    one = order(0, 0, np.arange(100), 100)
    assert not np.array_equal(one, order(0, 1, np.arange(100), 100))
    assert not np.array_equal(one, order(1, 0, np.arange(100), 100))


@pytest.mark.parametrize("count", [7, 100, 335])
def test_every_place_gets_every_sample_equally_often(count: int) -> None:
    """Chi-square of (place, sample) counts over epochs; the bound is six standard deviations away."""
    runs = 10 * count
    at = np.stack([order(5, epoch, np.array([0, count // 2, count - 1]), count) for epoch in range(runs)])
    neighbours = np.stack([order(6, epoch, np.array([0, 1]), count) for epoch in range(runs)])
    followers = (neighbours[:, 1] - neighbours[:, 0]) % count - 1  # a shuffle has no favourite successor
    for drawn, cells in [(at[:, 0], count), (at[:, 1], count), (at[:, 2], count), (followers, count - 1)]:
        expected = runs / cells
        chi2 = ((np.bincount(drawn, minlength=cells) - expected) ** 2 / expected).sum()
        assert abs(chi2 - (cells - 1)) < 6 * np.sqrt(2 * (cells - 1))


def test_the_order_never_changes_between_versions() -> None:
    """A run that is resumed years later must go on where it stopped."""
    assert order(7, 3, np.arange(12), 12).tolist() == [5, 9, 6, 2, 4, 8, 3, 1, 10, 7, 0, 11]


def test_a_position_outside_the_epoch_is_refused() -> None:
    with pytest.raises(UsageError, match="0 <= position < 10"):
        order(0, 0, np.array([3, 10]), 10)
