"""The schedule: what any batch holds, from its number alone; every sample once per epoch, and no bucket mixed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.buckets import Bucket, Members
from training.data.order import order
from training.data.schedule import Schedule
from training.errors import DataError, UsageError

counts_of = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def schedule(counts: list[int], global_batch: int = 8, seed: int = 0, block: int = 4, window: int = 3) -> Schedule:
    """Buckets of these sizes, the samples dealt out in turn."""
    buckets = tuple(Bucket(8 * (number + 1), 8, 8) for number in range(len(counts)))
    ids = None
    if len(counts) > 1:
        ids = np.random.default_rng(sum(counts)).permutation(sum(counts)).astype(np.uint32)
    return Schedule(
        Members(buckets, tuple(counts), ids), global_batch=global_batch, seed=seed, block=block, window=window
    )


def bucket_of(made: Schedule, sample: int) -> int:
    """Where a sample belongs."""
    return next(
        number for number, size in enumerate(made.members.counts) if sample in made.members.ids(number, np.arange(size))
    )


@given(counts_of, st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_each_bucket_gives_every_sample_once_in_each_of_its_epochs(counts: list[int], rows: int, seed: int) -> None:
    made = schedule(counts, rows, seed)
    epochs = 3
    batches = [made.batch(number) for number in range(sum(epochs * size // rows for size in counts))]
    for bucket, size in enumerate(counts):
        own = [each for each in batches if each.bucket == bucket]
        assert len(own) == epochs * size // rows
        consumed = Counter(
            (int(epoch), int(index)) for each in own for epoch, index in zip(each.epochs, each.ids, strict=True)
        )
        assert set(consumed.values()) <= {1}
        ids = set(made.members.ids(bucket, np.arange(size)).tolist())
        for epoch in range(epochs * size // rows * rows // size):
            assert {index for of, index in consumed if of == epoch} == ids
        stream = np.concatenate([each.ids for each in own]) if own else np.empty(0)
        for epoch in range(len(stream) // size):
            part = stream[epoch * size : (epoch + 1) * size]
            assert set(part.tolist()) == ids, "a bucket's batches come in the order of its own stream"


@given(counts_of, st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_batch_depends_on_its_number_alone(counts: list[int], rows: int, number: int) -> None:
    fresh, used = schedule(counts, rows), schedule(counts, rows)
    for earlier in range(max(0, number - 5), number):
        used.batch(earlier)
    one, other = fresh.batch(number), used.batch(number)
    assert one.ids.tolist() == other.ids.tolist()
    assert one.epochs.tolist() == other.epochs.tolist()
    assert (one.bucket, one.position) == (other.bucket, number * rows)
    assert {bucket_of(fresh, index) for index in one.ids.tolist()} == {one.bucket}
    assert len(one.ids) == rows


@given(counts_of, st.integers(1, 12), st.integers(0, 5000))
@settings(max_examples=40, deadline=None)
def test_ranks_share_a_batch_completely_and_almost_equally(counts: list[int], world: int, number: int) -> None:
    made = schedule(counts, 12)
    whole = made.batch(number)
    for rank in range(world):
        share = made.batch(number, rank, world)
        assert len(share.ids) in (12 // world, -(-12 // world))
        assert share.ids.tolist() == whole.ids[rank::world].tolist()
        assert share.epochs.tolist() == whole.epochs[rank::world].tolist()
        assert (share.bucket, share.position) == (whole.bucket, whole.position)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_one_bucket_is_the_plain_stream(count: int, rows: int, number: int) -> None:
    batch = schedule([count], rows).batch(number)
    for place, (index, epoch) in enumerate(zip(batch.ids.tolist(), batch.epochs.tolist(), strict=True)):
        at = number * rows + place
        assert epoch == at // count
        assert index == order(0, epoch, np.array([at % count]), count, block=4, window=3)[0]


def test_buckets_take_turns_evenly_and_otherwise_in_each_epoch() -> None:
    made = schedule([800, 400, 80], 8)
    turns = [made.batch(number).bucket for number in range(320)]
    for epoch in (turns[:160], turns[160:]):
        assert Counter(epoch) == {0: 100, 1: 50, 2: 10}
        for start in range(0, 160, 16):  # any tenth of an epoch holds each bucket's tenth, give or take one
            part = Counter(epoch[start : start + 16])
            assert all(abs(part[bucket] - expected) <= 1 for bucket, expected in ((0, 10), (1, 5), (2, 1)))
    assert turns[:160] != turns[160:]


def test_the_schedule_never_changes_between_versions() -> None:
    made = schedule([30, 20, 9], 4, seed=5)
    assert [made.batch(number).bucket for number in range(14)] == [0, 1, 0, 2, 1, 0, 0, 1, 0, 1, 2, 0, 1, 0]
    assert made.batch(10**6).ids.tolist() == [45, 49, 33, 57]


def test_far_batches_are_reached_at_once() -> None:
    """Positions beyond what 64 bits hold are no different."""
    made = schedule([30, 20], 4)
    assert made.batch(10**15).position == 4 * 10**15
    assert int(made.batch(10**15).epochs[0]) == pytest.approx(4 * 10**15 / 50, rel=1e-6)


def test_nothing_and_the_time_before_the_first_batch_are_refused() -> None:
    with pytest.raises(DataError, match="The split is empty"):
        schedule([0])
    with pytest.raises(UsageError, match="counted from 0"):
        schedule([5]).batch(-1)
