"""What happens when a training process ends: decided once for all ranks of a worker group. Knows neither Ray nor torch.

Every agent says how its process ended. The first end that is a failure calls the processes of the other ranks in,
whatever they hang in, and when all have ended there is one verdict: finished, stopped, failed, or once more.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from training.errors import TrainingError


@dataclass(frozen=True)
class Group:
    """One worker group of Ray Train.

    Attributes:
        label: tells trials apart.
        number: a later group of the label has a greater one.
        world: how many ranks it has.
        max_failures: how often in a row its processes are replaced without a new step.
    """

    label: str
    number: float
    world: int
    max_failures: int


@dataclass(frozen=True)
class End:
    """How the training process of a rank ended.

    Attributes:
        rank: whose.
        code: its exit code; negative for a signal.
        step: the last step that it told; 0 where none.
        time_s: when.
        log: its log.
        called_in: whether its agent killed it because another rank's had failed.
        address: this rank's node.
        port: free there.
        error: the event by which it said why.
    """

    rank: int
    code: int
    step: int
    time_s: float
    log: str
    called_in: bool
    address: str
    port: int
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Verdict:
    """What all ranks do now.

    Attributes:
        kind: all have finished; they leave because the run is to stop; they leave because it failed; or they have
            their processes forked anew.
        what: who failed, how and at which step.
        since_s: when it failed.
        address: where the next processes meet.
        port: the same.
        error: the event that tells why the run failed.
    """

    kind: Literal["finished", "stopped", "failed", "again"]
    what: str = ""
    since_s: float = 0.0
    address: str = ""
    port: int = 0
    error: Mapping[str, Any] | None = None


@dataclass
class _Round:
    """The processes of one start."""

    ends: dict[int, End] = field(default_factory=dict)
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    verdict: Verdict | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Supervision:
    """Settles the ends of one group's processes, in an event loop.

    Args:
        group: whose.
        stopping: says whether the run is to stop.
    """

    def __init__(self, group: Group, stopping: Callable[[], bool]) -> None:
        self.group, self._stopping = group, stopping
        self._rounds: dict[int, _Round] = {}
        self._best = 0
        self._in_vain = 0

    async def failure(self, number: int) -> bool:
        """Wait until a process of the start ``number`` has failed; False when all have finished without."""
        start = self._rounds.setdefault(number, _Round())
        await start.failed.wait()
        return start.verdict is None or start.verdict.kind != "finished"

    async def ended(self, number: int, end: End) -> Verdict:
        """Take the end of a rank's process; answers when those of all ranks have ended.

        Args:
            number: which start of the group's processes it was of, 0-based.
            end: how.
        """
        start = self._rounds.setdefault(number, _Round())
        start.ends[end.rank] = end
        if end.code:
            start.failed.set()
        if len(start.ends) == self.group.world and start.verdict is None:
            start.verdict = self._settle(list(start.ends.values()))
            start.failed.set()
            start.settled.set()
            self._rounds.pop(number - 1, None)
        await start.settled.wait()
        if start.verdict is None:
            raise TrainingError("A start of the training processes was settled without a verdict.", value=number)
        return start.verdict

    def _settle(self, ends: list[End]) -> Verdict:
        failures = [end for end in ends if end.code and not end.called_in]
        if not failures:
            return Verdict("finished")
        first = min(failures, key=_explains)
        if first.error and first.error.get("typed"):  # before the wish to stop: the user is to hear of it
            return Verdict("failed", error=first.error)
        if self._stopping():
            return Verdict("stopped")
        done = max(end.step for end in ends)
        if done > self._best:
            self._best, self._in_vain = done, 0
        self._in_vain += 1
        what = _account(first, done)
        if self._in_vain > self.group.max_failures:
            return Verdict("failed", what, error=self._given_up(first, what))
        zero = next(end for end in ends if end.rank == 0)
        return Verdict("again", what, min(end.time_s for end in failures), zero.address, zero.port)

    def _given_up(self, end: End, what: str) -> Mapping[str, Any]:
        times = f", {self._in_vain} times in a row without a new step" if self._in_vain > 1 else ""
        error = TrainingError(
            f"Training failed: {what}{times}.",
            rule=f"workers.max_failures is {self.group.max_failures}",
            mend=f"its log {end.log} tells more; the same command goes on from the newest checkpoint",
        )
        return {
            "event": "error",
            "typed": True,
            "exit_code": error.exit_code,
            "message": error.as_text(),
            "time_s": end.time_s,
        }


def _explains(end: End) -> tuple[bool, bool, float]:
    """Orders failures: a typed error, then a signal, then the first; the others lost their connection to it."""
    typed = bool(end.error and end.error.get("typed"))
    return not typed, end.code > 0, float(end.error["time_s"]) if end.error else end.time_s


def _account(end: End, done: int) -> str:
    """Which rank failed, how, and in which step."""
    place = f"at step {done + 1}" if done else "before its first step"
    if end.code < 0:
        known = {each.value for each in signal.Signals}
        name = signal.Signals(-end.code).name if -end.code in known else f"signal {-end.code}"
        return f"rank {end.rank} was killed ({name}) {place}"
    why = f": {end.error['message']}" if end.error else ""
    return f"rank {end.rank} ended with exit code {end.code} {place}{why}"
