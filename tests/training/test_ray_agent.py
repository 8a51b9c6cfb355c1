"""Which error explains the end of a run, and how an agent ends that was told to stop."""

from typing import Any

import pytest

from training.ray_agent import cause

FULL = {"attempt": 2.0, "time_s": 10.0, "message": "No space left on device"}
ECHO = {"attempt": 2.0, "time_s": 10.2, "message": "Connection closed by peer"}
TYPED = {"attempt": 2.0, "time_s": 10.4, "typed": True, "message": "The data set is damaged."}
MENDED = {"attempt": 1.0, "time_s": 3.0, "typed": True, "message": "of an attempt before"}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([FULL, ECHO], FULL),
        ([ECHO, FULL], FULL),
        ([FULL, ECHO, TYPED], TYPED),
        ([TYPED, FULL], TYPED),
        ([MENDED, ECHO], ECHO),
        ([ECHO, MENDED], ECHO),
    ],
)
def test_the_first_error_of_the_last_attempt_explains_it_and_a_typed_one_better(
    told: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    known = None
    for event in told:
        known = cause(known, event)
    assert known == expected
