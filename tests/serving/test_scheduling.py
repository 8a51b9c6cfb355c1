"""Whose turn it is, in virtual time: latency, fairness, deadlines, priorities, and that nobody starves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bucket import Bucket
from serving.scheduling import Call
from tests.serving.virtual_time import (
    SQUARE,
    WIDE,
    Image,
    mean_latency_s,
    percentile_latency_s,
    poisson,
    replay,
    replay_static,
    scheduler,
)

CALL = Call(rows=4, seconds=1.0)
TABLE = {SQUARE: CALL, WIDE: Call(rows=4, seconds=2.0)}


@pytest.mark.parametrize("seed", range(3))
def test_few_steps_among_many_wait_a_quarter_as_long_as_in_static_batches(seed: int) -> None:
    one_size = {SQUARE: CALL}
    ours, theirs = (poisson(400, 0.9, one_size, steps=(4, 50), takes=(2,), seed=seed) for _ in range(2))
    replay(scheduler(one_size), ours)
    replay_static(one_size, theirs)
    assert mean_latency_s(ours, 4) * 4 < mean_latency_s(theirs, 4)


@pytest.mark.parametrize("seed", range(3))
def test_of_a_mixed_trace_the_slowest_wait_much_less_than_in_static_batches(seed: int) -> None:
    """Steps of 4, 20 and 50, two sizes, guided or not, at 0.9 of what full calls can do."""
    ours, theirs = (poisson(300, 0.9, TABLE, seed=seed) for _ in range(2))
    told, static = replay(scheduler(TABLE), ours), replay_static(TABLE, theirs)
    assert percentile_latency_s(ours, 0.95) < 0.7 * percentile_latency_s(theirs, 0.95)
    assert mean_latency_s(ours, 4) * 4 < mean_latency_s(theirs, 4)
    assert told.rows == static.rows
    assert told.padded_rows < 1.02 * static.padded_rows


def test_with_more_work_than_can_be_done_every_call_is_full() -> None:
    images = [Image(steps, bucket=bucket) for steps in (4, 20, 50) for bucket in (SQUARE, WIDE) for _ in range(20)]
    told = replay(scheduler(TABLE), images)
    needed = sum(image.steps * image.takes for image in images)
    assert told.rows == needed
    assert needed / told.padded_rows > 0.97


def test_a_short_image_overtakes_long_ones_within_one_call() -> None:
    long = [Image(50) for _ in range(6)]
    short = Image(4, arrived_s=10.5)
    replay(scheduler(TABLE), [*long, short])
    assert short.latency_s == 4.5  # the call that runs, and its own four


def test_nobody_starves_and_who_is_due_is_in_every_call_from_then_on() -> None:
    """A stream of short images that alone is more than the device can do."""
    long = Image(50)
    stream = [Image(4, arrived_s=float(second) * 1.9) for second in range(600)]
    told = replay(scheduler(TABLE, stretch=8.0, priority_s=0.0), [long, *stream])
    due_s = 8.0 * 50 * 2 / 4
    later = [turn for began_s, turn in told.turns if due_s < began_s < long.finished_s]
    assert later
    assert all(long in turn for turn in later)
    assert long.finished_s <= due_s + 50 + 1
    overtaken = [image for image in stream if image.finished_s < long.finished_s]
    assert len(overtaken) > 50, "and until then the short ones went first"


def test_without_stretch_it_is_first_come_first_served() -> None:
    images = [Image(steps, arrived_s=float(place) / 10) for place, steps in enumerate((50, 4, 20, 4, 30))]
    replay(scheduler(TABLE, stretch=0.0), images)
    assert images[0].finished_s == 50
    assert images[1].finished_s < images[2].finished_s < images[3].finished_s + 20


def test_the_urgent_go_before_the_patient_for_as_long_as_a_level_is_worth() -> None:
    patient = Image(10, priority=9)
    urgent = [Image(10, arrived_s=float(second), priority=0) for second in range(1, 200, 5)]
    replay(scheduler({SQUARE: Call(rows=2, seconds=1.0)}, priority_s=2.0), [patient, *urgent])
    assert urgent[0].finished_s < patient.finished_s
    last_before = max(image.arrived_s for image in urgent if image.finished_s < patient.finished_s)
    assert last_before <= 9 * 2.0 + 10, "nine levels of two seconds, and what it takes itself"


def test_a_deadline_is_met_where_it_can_be() -> None:
    others = [Image(20) for _ in range(10)]
    hurried = Image(50, deadline_at_s=60.0)
    told = replay(scheduler(TABLE), [*others, hurried])
    assert hurried.finished_s <= 60
    assert told.late == []


def test_who_cannot_be_in_time_any_more_is_given_up_before_work_is_wasted() -> None:
    hopeless = Image(50, deadline_at_s=49.0)
    told = replay(scheduler(TABLE), [hopeless, Image(4)])
    assert told.late == [hopeless]
    assert told.calls == 4
    assert scheduler(TABLE).hopeless([Image(50, deadline_at_s=50.0)], 0.0) == []


def test_images_of_one_request_do_not_take_the_others_turns() -> None:
    many = [Image(20, place=place) for place in range(1, 9)]
    one = Image(20, arrived_s=0.5)
    replay(scheduler(TABLE), [*many, one])
    assert sum(image.finished_s < one.finished_s for image in many) <= 2


def test_another_size_waits_for_fuller_calls_and_is_never_blocked() -> None:
    crowd = [Image(20, arrived_s=float(second) * 10) for second in range(100)]
    lone = Image(20, bucket=WIDE)
    told = replay(scheduler(TABLE), [*crowd, lone])
    assert lone.finished_s <= 10.0 * 20 * 2.0 + 20 * 2.0 + 2, "its due time, its work, and the call that runs"
    assert all(len({image.bucket for image in turn}) == 1 for _, turn in told.turns)


def test_a_guided_image_makes_two_calls_where_a_call_takes_one_row() -> None:
    guided, alone = Image(3), Image(3, takes=1)
    told = replay(scheduler({SQUARE: Call(rows=1, seconds=1.0)}), [guided, alone])
    assert told.calls == 9
    assert told.padded_rows == told.rows == 9


IMAGES = st.lists(
    st.builds(
        Image,
        evaluations_left=st.integers(1, 60),
        arrived_s=st.floats(0, 100),
        bucket=st.sampled_from([SQUARE, WIDE, Bucket(8, 8, "sepia")]),
        takes=st.sampled_from([1, 2]),
        place=st.integers(1, 4),
        priority=st.integers(0, 9),
        deadline_at_s=st.none() | st.floats(100, 1000),
    ),
    max_size=12,
)


@given(IMAGES, st.sampled_from([1, 2, 3, 8]), st.randoms(use_true_random=False))
def test_a_step_is_of_one_bucket_fits_a_call_and_depends_on_no_order(
    images: list[Image], rows: int, draw: random.Random
) -> None:
    call = Call(rows, 0.5)
    policy = scheduler(dict.fromkeys((SQUARE, WIDE, Bucket(8, 8, "sepia")), call))
    step = policy.choose(images)
    assert bool(step) == bool(images)
    assert len({image.bucket for image in step}) <= 1
    assert sum(image.takes for image in step) <= max(rows, 2)
    if rows > 1 and step:
        beside = [image for image in images if image.bucket == step[0].bucket and image not in step]
        assert all(image.takes > rows - sum(each.takes for each in step) for image in beside), "no place stays empty"
    for place, image in enumerate(images):
        image.arrived_s = float(place)
    assert policy.choose(draw.sample(images, len(images))) == policy.choose(images)
