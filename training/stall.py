"""A rank that stands still is noticed, whatever it hangs in, and the user is told which one is late."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from training.guards_config import GuardsConfig
from training.spec import Emit
from training.stopwatch import Stopwatch

FOLDER = "progress"
LOOKS = 8
"""How often a thread looks while ``stall_s`` passes."""
STALLED = 75
"""The exit code of a process that was ended for standing still (EX_TEMPFAIL)."""
LONG = frozenset({"evaluation", "checkpoint"})
"""Sections that take long by themselves."""


@dataclass(frozen=True)
class Progress:
    """How far a rank has come, in ``RUN/progress/rank-R.json``.

    Attributes:
        rank: its number.
        step: the step that it works on, 1-based.
        section: the part of the step; empty between two.
        moves: parts begun or ended so far; the rank with the fewest is the one that the others wait for.
        host: where it runs.
        pid: its process.
        stalled: whether it has noticed that it stands still.
    """

    rank: int
    step: int
    section: str
    moves: int
    host: str
    pid: int
    stalled: bool

    def where(self) -> str:
        """For people."""
        place = f"{self.section or 'between the parts'} of step {self.step}" if self.step else "before the first step"
        return f"rank {self.rank} (process {self.pid} on {self.host}) in {place}"


class StallWatch:
    """Watches this process from a thread of its own, inside ``with``.

    Every rank leaves word of its progress in the run's folder. One that has made none for ``stall_s`` writes the
    stacks of its threads into its log; the first of those that noticed tells who is late. What takes long by itself is
    given ``long_stall_s``, and so is whoever waits for a rank that is at it. The thread needs Python's lock: should a
    library hold that while it hangs, faulthandler's own thread writes the stacks.

    Args:
        config: the recipe's section.
        clock: moves with the steps.
        run_dir: the run's folder, which all ranks see.
        rank: of this process.
        world: how many there are.
        emit: takes what the user is told.
        first_step: of this process, 1-based.
    """

    def __init__(
        self,
        config: GuardsConfig,
        clock: Stopwatch,
        run_dir: Path,
        rank: int,
        world: int,
        emit: Emit,
        first_step: int = 1,
    ) -> None:
        self._config, self._clock, self._emit, self._first_step = config, clock, emit, first_step
        self._folder, self._rank, self._world = run_dir / FOLDER, rank, world
        self._every_s = config.stall_s / LOOKS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)

    def __enter__(self) -> StallWatch:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tell(stalled=False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        moves, since, told = self._clock.moves, time.monotonic(), False
        while not self._over.wait(self._every_s):
            if self._clock.moves != moves:
                moves, since, told = self._clock.moves, time.monotonic(), False
            if told:
                continue
            mine = self._tell(stalled=False)  # also without a move: the others see that it still answers
            limit_s, passed_s = self._limit_s([mine]), time.monotonic() - since
            faulthandler.dump_traceback_later(limit_s + 3 * self._every_s, file=sys.__stderr__ or sys.stderr)
            if passed_s >= limit_s and passed_s >= self._limit_s(self._awaited(mine)):
                told = True
                self._stalled(passed_s)

    def _limit_s(self, those: list[Progress]) -> float:
        """How long none of these may make no progress."""
        long = any(each.section in LONG or each.step <= self._first_step for each in those)
        return max(self._config.stall_s, self._config.long_stall_s) if long else self._config.stall_s

    def _awaited(self, mine: Progress) -> list[Progress]:
        """The ranks that are behind this one and still say so."""
        oldest_s = self._told_s(self._rank) - 3 * self._every_s
        behind = (each for each in self.everyone() if each.moves < mine.moves)
        return [each for each in behind if self._told_s(each.rank) >= oldest_s]

    def _told_s(self, rank: int) -> float:
        """When a rank last left word, by the clock of the storage; 0 where it cannot be seen."""
        try:
            return self._path(rank).stat().st_mtime
        except OSError:
            return 0.0

    def _stalled(self, passed_s: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        mine = self._tell(stalled=True)
        stderr = sys.__stderr__ or sys.stderr
        stderr.write(f"No progress for {round(passed_s, 1):g} s: {mine.where()}. The stacks of its threads:\n")
        stderr.flush()
        faulthandler.dump_traceback(file=stderr)
        if self._over.wait(2 * self._every_s) or self._clock.moves != mine.moves:  # in which the others notice as well
            return
        known = self.everyone()
        first = next((each.rank for each in known if each.stalled), self._rank) == self._rank
        if first:
            message = account(known, self._world, passed_s)
            kind = "warning" if self._config.on_stall == "warn" else "error"
            self._emit({"event": kind, "message": message, "time_s": time.time()})
        if self._config.on_stall == "restart":
            # the others leave later: the end of one is the end of all, and the first is to be heard
            if not first and self._over.wait(4 * self._every_s):
                return
            os._exit(STALLED)

    def everyone(self) -> list[Progress]:
        """What every rank has last told, by rank; one that cannot be read is missing."""
        found = []
        for rank in range(self._world):
            try:
                found.append(Progress(**json.loads(self._path(rank).read_text())))
            except (OSError, ValueError, TypeError):  # its node may be gone: account() says that nothing is known
                continue
        return found

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _tell(self, *, stalled: bool) -> Progress:
        clock = self._clock
        mine = Progress(self._rank, clock.step, clock.section, clock.moves, socket.gethostname(), os.getpid(), stalled)
        aside = self._path(self._rank).with_suffix(".partial")
        try:
            aside.write_text(json.dumps(asdict(mine)))
            aside.replace(self._path(self._rank))
        except OSError as error:
            sys.stderr.write(f"{self._path(self._rank)} cannot be written: {error}\n")
        return mine


def account(known: list[Progress], world: int, passed_s: float) -> str:
    """Who is late, and where the others wait.

    Args:
        known: what the ranks have last told.
        world: how many there are.
        passed_s: for how long nothing moved.
    """
    least = min((each.moves for each in known), default=0)
    late = [each for each in known if each.moves == least or not each.stalled]
    silent = sorted(set(range(world)) - {each.rank for each in known})
    parts = [each.where() + ("" if each.stalled else ", which does not answer") for each in late]
    parts += [f"rank {rank}, of which nothing is known" for rank in silent]
    waiting = sorted(
        {f"{each.section or 'between the parts'} of step {each.step}" for each in known if each not in late}
    )
    rest = f" The others wait in {', '.join(waiting)}." if waiting else ""
    who = "Late: " if waiting or silent else "All stand still: "
    return (
        f"No progress for {round(passed_s, 1):g} s. {who}{'; '.join(parts)}.{rest} The stacks are in the logs of the"
        " ranks."
    )
