"""A process that stands still says so from a thread beside it, whatever it hangs in."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from training.guards_config import GuardsConfig
from training.stall import STALLED, Progress, StallWatch, account
from training.stopwatch import Stopwatch


def progress(rank: int, section: str, moves: int, stalled: bool = True) -> Progress:
    return Progress(rank, 7, section, moves, "node", 100 + rank, stalled)


def test_the_rank_with_the_least_progress_is_late_and_the_others_wait_for_it() -> None:
    known = [progress(0, "communication", 40), progress(1, "data", 37), progress(2, "communication", 40)]
    assert account(known, 3, 600) == (
        "No progress for 600 s. Late: rank 1 (process 101 on node) in data of step 7. The others wait in communication"
        " of step 7. The stacks are in the logs of the ranks."
    )


def test_a_rank_that_says_nothing_is_late() -> None:
    told = account([progress(0, "communication", 40), progress(1, "forward", 38, stalled=False)], 3, 600)
    assert "Late: rank 1 (process 101 on node) in forward of step 7, which does not answer; rank 2, of which" in told


def test_ranks_that_all_hang_at_the_same_place_are_all_named() -> None:
    told = account([progress(0, "communication", 40), progress(1, "communication", 40)], 2, 600)
    assert told.startswith("No progress for 600 s. All stand still: rank 0 (process 100 on node) in communication")


def stuck_in_a_reader(pipe: int) -> bytes:
    return os.read(pipe, 1)


def test_a_stuck_reader_is_named_with_its_stack(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The main thread hangs in a read until the watch has spoken; then it goes on, and nothing is ended."""
    clock, told, (reading, writing) = Stopwatch(), [], os.pipe()

    def emit(event: Any) -> None:
        told.append(event)
        os.write(writing, b"x")

    with StallWatch(GuardsConfig(stall_s=0.2), clock, tmp_path, 0, 1, emit):
        clock.step = 3
        with clock("data"):
            assert stuck_in_a_reader(reading) == b"x"
    (event,) = told
    assert event["event"] == "warning"
    assert f"rank 0 (process {os.getpid()} on " in event["message"]
    assert "in data of step 3" in event["message"]
    assert "stuck_in_a_reader" in capfd.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name == "stall watch"]


class Heard(list[str]):
    """What watches tell; ``first`` is set once there is something."""

    def __init__(self) -> None:
        self.first = threading.Event()

    def __call__(self, event: Any) -> None:
        self.append(event["message"])
        self.first.set()

    def after_s(self) -> float:
        """After how long without progress the first one was told."""
        return float(self[0].removeprefix("No progress for ").partition(" s")[0])


@pytest.mark.parametrize(("step", "section"), [(4, "forward"), (7, "evaluation"), (7, "checkpoint")])
def test_what_takes_long_by_itself_is_given_longer(tmp_path: Path, step: int, section: str) -> None:
    clock, heard = Stopwatch(), Heard()
    clock.step = step
    config = GuardsConfig(stall_s=0.2, long_stall_s=0.8)
    with StallWatch(config, clock, tmp_path, 0, 1, heard, first_step=4), clock(section):
        assert heard.first.wait(60)
    assert heard.after_s() >= 0.8
    assert f"in {section} of step {step}" in heard[0]


def test_whoever_waits_for_a_rank_that_measures_is_given_longer_too(tmp_path: Path) -> None:
    clocks, heard = (Stopwatch(), Stopwatch()), Heard()
    config = GuardsConfig(stall_s=0.2, long_stall_s=0.8)
    watches = [StallWatch(config, clock, tmp_path, rank, 2, heard) for rank, clock in enumerate(clocks)]
    for clock in clocks:
        clock.step = 7
    with clocks[0]("evaluation"):
        pass
    with clocks[1]("evaluation"), clocks[0]("communication"), watches[1], watches[0]:
        assert heard.first.wait(60)
    assert heard.after_s() >= 0.8
    assert "in evaluation of step 7" in heard[0]


def test_a_stopped_process_is_found_by_its_sibling_and_the_group_ends(
    runs: Any, tmp_path: Path, running_process: Any
) -> None:
    """Rank 1 is stopped as a debugger would; rank 0 hangs in a collective and says whom it waits for."""
    config = runs.config(steps=100000, guards={"stall_s": 2, "on_stall": "restart"}, cost={"energy": False})
    ranks = runs.start(config, "stopped", world=2)
    for _ in range(3):
        ranks[0].until("step")
    stopped = running_process(ranks[1].log)
    os.kill(stopped, signal.SIGSTOP)
    error = ranks[0].until("error")
    assert ranks[0].end() == STALLED
    assert "typed" not in error, "the group may be started again"
    assert f"rank 1 (process {stopped} on " in error["message"]
    assert "which does not answer" in error["message"]
    assert "all_reduce" in (tmp_path / "stopped" / "rank-0.log").read_text()
    os.kill(stopped, signal.SIGKILL)
