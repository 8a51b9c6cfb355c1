"""Seconds go to the section that is open, once."""

import time

import pytest

from training.stopwatch import Stopwatch


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_sections_add_up_and_an_inner_one_stops_the_outer() -> None:
    clock = Stopwatch()
    began = time.perf_counter()
    for _ in range(3):
        with clock("backward"):
            busy(0.01)
            with clock("communication"):
                busy(0.02)
            busy(0.01)
    passed = time.perf_counter() - began
    totals = clock.totals()
    assert set(totals) == {"backward", "communication"}
    assert totals["backward"] >= 0.06
    assert totals["communication"] >= 0.06
    assert sum(totals.values()) <= passed, "no second counts twice"


def test_a_lap_is_what_was_added_since_the_last() -> None:
    clock = Stopwatch()
    with clock("data"):
        busy(0.01)
    first = clock.lap()
    assert first == clock.totals()
    assert clock.lap() == {"data": 0.0}
    with clock("forward"):
        busy(0.01)
    second = clock.lap()
    assert (second["data"], second["forward"] > 0) == (0.0, True)


def test_it_says_where_it_is_and_what_failed() -> None:
    clock = Stopwatch()
    assert (clock.section, clock.moves, clock.failed) == ("", 0, "")

    def fail() -> None:
        with clock("backward"), clock("communication"):
            assert clock.section == "communication"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (clock.section, clock.failed) == ("", "communication")
    assert clock.moves == 6
