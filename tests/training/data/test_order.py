"""The order is a permutation, the same however it is asked for; what it mixes it mixes as well as a shuffle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.order import order
from training.errors import UsageError

seeds = st.integers(-(2**63), 2**63)
epochs = st.integers(0, 2**31)
blocks = st.sampled_from([1, 2, 3, 7, 16, 100, 256, 10**5])
windows = st.sampled_from([1, 2, 3, 5, 64, 10**5])


@given(seeds, epochs, st.integers(1, 3000), blocks, windows)
def test_each_epoch_is_a_permutation(seed: int, epoch: int, count: int, block: int, window: int) -> None:
    samples = order(seed, epoch, np.arange(count), count, block=block, window=window)
    assert np.array_equal(np.sort(samples), np.arange(count))


@given(seeds, epochs, st.integers(1, 500), blocks, windows, st.data())
def test_the_order_does_not_depend_on_how_it_is_asked(
    seed: int, epoch: int, count: int, block: int, window: int, data: st.DataObject
) -> None:
    def of(positions: np.ndarray) -> np.ndarray:
        return order(seed, epoch, positions, count, block=block, window=window)

    whole = of(np.arange(count))
    asked = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), dtype=np.int64)
    assert np.array_equal(of(asked), whole[asked])
    assert np.array_equal(of(np.arange(count // 2 * 2).reshape(2, -1)), whole[: count // 2 * 2].reshape(2, -1))
    cut = data.draw(st.integers(0, count))
    assert np.array_equal(np.concatenate([of(part) for part in np.split(np.arange(count), [cut])]), whole)


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 20), st.integers(0, 9))
def test_reads_stay_local(count: int, block: int, window: int, epoch: int) -> None:
    """Blocks are read in windows: a window's samples are those of at most ``window`` blocks, each of them whole."""
    rest = order(3, epoch, np.arange(count), count, block=block, window=window) // block
    while len(rest):
        numbers, first_seen = np.unique(rest, return_index=True)
        opened = set(numbers[np.argsort(first_seen)][:window].tolist())
        size = sum(min(block, count - number * block) for number in opened)
        assert set(rest[:size].tolist()) == opened
        assert not opened & set(rest[size:].tolist())
        rest = rest[size:]


@given(st.integers(2, 2**62), st.integers(1, 2**20), st.integers(1, 2**20), st.data())
@settings(max_examples=50)
def test_any_size_is_reached_at_once(count: int, block: int, window: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, count - 1))
    found = order(1, 2, np.array([position]), count, block=block, window=window)
    assert found.dtype == np.int64
    assert 0 <= found[0] < count


def test_seeds_epochs_and_streams_differ() -> None:
    one = order(0, 0, np.arange(100), 100)
    for other in (
        order(0, 1, np.arange(100), 100),
        order(1, 0, np.arange(100), 100),
        order(0, 0, np.arange(100), 100, stream=1),
    ):
        assert not np.array_equal(one, other)


@pytest.mark.parametrize(("count", "block", "window"), [(7, 256, 64), (100, 1, 64), (150, 150, 1), (84, 7, 4)])
def test_every_place_gets_every_sample_equally_often(count: int, block: int, window: int) -> None:
    """Chi-square of (place, sample) counts over epochs; the bound is six standard deviations away.

    A short block shifts the borders of the others, so that this holds only nearly where there is one among several.
    """
    runs = 10 * count
    places = np.array([0, count // 2, count - 1])
    at = np.stack([order(5, epoch, places, count, block=block, window=window) for epoch in range(runs)])
    for drawn in at.T:
        chi2 = ((np.bincount(drawn, minlength=count) - runs / count) ** 2 / (runs / count)).sum()
        assert abs(chi2 - (count - 1)) < 6 * np.sqrt(2 * (count - 1))


@pytest.mark.parametrize("count", [7, 100, 150])
def test_within_a_window_a_shuffle_has_no_favourite_successor(count: int) -> None:
    runs = 10 * count
    at = np.stack([order(6, epoch, np.array([0, 1]), count) for epoch in range(runs)])
    followers = (at[:, 1] - at[:, 0]) % count - 1
    expected = runs / (count - 1)
    chi2 = ((np.bincount(followers, minlength=count - 1) - expected) ** 2 / expected).sum()
    assert abs(chi2 - (count - 2)) < 6 * np.sqrt(2 * (count - 2))


def test_position_says_nothing_of_the_index() -> None:
    """Correlation over an epoch, and within a window; of a shuffle it is normal with deviation 1 / sqrt(n)."""
    count, block, window = 200_000, 256, 16
    samples = order(1, 0, np.arange(count), count, block=block, window=window)
    blocks_in_row = count / block
    assert abs(np.corrcoef(np.arange(count), samples)[0, 1]) < 5 / np.sqrt(blocks_in_row)  # whole blocks move together
    inside = samples[: window * block]
    assert abs(np.corrcoef(np.arange(len(inside)), inside % block)[0, 1]) < 5 / np.sqrt(len(inside))
    assert abs(np.corrcoef(inside[:-1] % block, inside[1:] % block)[0, 1]) < 5 / np.sqrt(len(inside))


def test_what_locality_costs() -> None:
    """Two samples in a row share a block with a chance of 1 / window; of a full shuffle it is block / count."""
    count, block = 2**18, 256
    for window, chance in [(4, 1 / 4), (64, 1 / 64), (2**10, block / count)]:
        drawn = order(2, 0, np.arange(count), count, block=block, window=window) // block
        share = float((drawn[1:] == drawn[:-1]).mean())
        assert abs(share - chance) < 6 * np.sqrt(chance / count)
        side_by_side = order(2, 0, np.arange(count), count, block=block, window=window)
        assert (np.abs(np.diff(side_by_side)) == 1).mean() < 2.5 * chance / block  # 2 neighbours of a block's 256


def test_the_order_never_changes_between_versions() -> None:
    """A run that is resumed years later must go on where it stopped."""
    assert order(7, 3, np.arange(12), 12).tolist() == [0, 4, 7, 8, 11, 3, 2, 9, 6, 10, 1, 5]
    blocks = order(7, 3, np.arange(12), 12, block=3, window=2, stream=1)
    assert blocks.tolist() == [6, 8, 9, 7, 10, 11, 5, 2, 3, 1, 0, 4]
    far = order(7, 3, np.array([0, 10**9 - 1]), 10**9)
    assert far.tolist() == [496433351, 504318199]


@pytest.mark.parametrize("options", [{"block": 0}, {"window": 0}])
def test_no_block_and_no_window_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="block >= 1 and window >= 1"):
        order(0, 0, np.array([3]), 10, **options)


def test_a_position_outside_the_epoch_is_refused() -> None:
    with pytest.raises(UsageError, match="0 <= position < 10"):
        order(0, 0, np.array([3, 10]), 10)
