"""What is decided when training processes end: once for all ranks, whoever tells first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from training.supervision import End, Group, Supervision, Verdict

GROUP = Group(label="", number=1.0, world=2, max_failures=2)
TYPED = {"typed": True, "message": "The data set is damaged.", "time_s": 5.0, "exit_code": 3}
ECHO = {"message": "RuntimeError: Connection closed by peer", "time_s": 4.0}


def end(rank: int, code: int = 0, *, step: int = 10, time_s: float = 1.0, **more: Any) -> End:
    """An end of a rank's process on its own node."""
    told = {"called_in": False, **more}
    return End(rank, code, step, time_s, f"logs/rank-{rank}.log", address=f"10.0.0.{rank}", port=5000 + rank, **told)


def supervised(*, stopping: bool = False, group: Group = GROUP) -> Supervision:
    """Of two ranks."""
    return Supervision(group, lambda: stopping)


def together(*waits: Coroutine[Any, Any, Any]) -> list[Any]:
    """All of them at once; what waits for what never comes is an error."""

    async def run() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*waits), 5)

    return asyncio.run(run())


def both(number: int, *ends: End, stopping: bool = False) -> Verdict:
    """The verdict on a start of the processes; the ranks are told the same."""
    supervision = supervised(stopping=stopping)
    verdicts: list[Verdict] = together(*(supervision.ended(number, each) for each in ends))
    assert verdicts[0] == verdicts[1]
    return verdicts[0]


def test_all_have_finished() -> None:
    assert both(0, end(0), end(1)) == Verdict("finished")


def test_a_killed_process_calls_the_other_one_in_and_both_are_forked_anew_where_rank_0_is() -> None:
    supervision = supervised()

    async def other() -> Verdict:
        assert await supervision.failure(0)
        return await supervision.ended(0, end(1, -9, step=12, time_s=3.0, called_in=True))

    verdict, same = together(supervision.ended(0, end(0, -9, step=11, time_s=2.0)), other())
    assert verdict == same
    assert verdict.kind == "again"
    assert verdict.what == "rank 0 was killed (SIGKILL) at step 13"
    assert (verdict.since_s, verdict.address, verdict.port) == (2.0, "10.0.0.0", 5000)


def test_two_that_die_at_once_are_one_failure() -> None:
    verdict = both(0, end(1, -9, time_s=2.0), end(0, -11, time_s=2.1))
    assert verdict.kind == "again"
    assert verdict.what == "rank 1 was killed (SIGKILL) at step 11"
    assert verdict.address == "10.0.0.0"


def test_a_rank_that_lost_its_connection_to_a_killed_one_is_not_to_blame() -> None:
    verdict = both(0, end(0, 1, time_s=2.0, error=ECHO), end(1, -9, time_s=2.5))
    assert verdict.what == "rank 1 was killed (SIGKILL) at step 11"


def test_a_death_beside_a_rank_that_has_finished_is_a_failure_of_the_run() -> None:
    verdict = both(0, end(0), end(1, -9))
    assert verdict.kind == "again"
    assert verdict.what.startswith("rank 1 was killed")


def test_a_typed_error_ends_the_run_even_while_it_is_asked_to_stop() -> None:
    for stopping in (False, True):
        verdict = both(0, end(0, -9), end(1, 3, error=TYPED), stopping=stopping)
        assert verdict == Verdict("failed", error=TYPED)


def test_who_asks_for_the_stop_during_a_recovery_gets_a_stop() -> None:
    assert both(0, end(0, -9), end(1, -9, called_in=True), stopping=True) == Verdict("stopped")


@pytest.mark.parametrize("failures", [0, 2])
def test_a_failure_without_a_new_step_is_tried_so_often_and_then_told(failures: int) -> None:
    supervision = supervised(group=Group("", 1.0, 2, failures))

    async def again(number: int) -> Verdict:
        ends = (end(0, -9), end(1, -9, called_in=True))
        first, _ = await asyncio.gather(*(supervision.ended(number, each) for each in ends))
        return first

    async def run() -> list[Verdict]:
        return [await again(number) for number in range(failures + 1)]

    *before, last = asyncio.run(run())
    assert {verdict.kind for verdict in before} <= {"again"}
    assert last.kind == "failed"
    message = str((last.error or {})["message"])
    assert f"workers.max_failures is {failures}" in message
    assert "logs/rank-0.log" in message
    assert ("3 times in a row" in message) == (failures == 2)


def test_a_new_step_begins_the_count_of_failures_again() -> None:
    supervision = supervised(group=Group("", 1.0, 2, max_failures=1))

    async def run() -> list[str]:
        kinds = []
        for number in range(6):
            ends = (end(0, -9, step=number + 1), end(1, -9, step=number, called_in=True))
            verdict, _ = await asyncio.gather(*(supervision.ended(number, each) for each in ends))
            kinds.append(verdict.kind)
        return kinds

    assert asyncio.run(run()) == ["again"] * 6


def test_nobody_is_called_in_when_all_have_finished() -> None:
    supervision = supervised()
    called, *_ = together(supervision.failure(0), supervision.ended(0, end(0)), supervision.ended(0, end(1)))
    assert called is False
