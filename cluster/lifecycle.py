"""A component's life: started and written down, waited for, found alive, cleared away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cluster import processes
from cluster.components import Component, mark
from cluster.state import Progress, State
from training.errors import StackError

SILENCE_S = 1.5
"""How long the stack waits for a component without a word."""


def mark_of(home: Path, part: Component) -> str:
    """What marks a component's processes, on the whole machine."""
    return f"{mark(home)}/{part.name}"


def log_of(home: Path, part: Component) -> Path:
    """Where a component's output goes."""
    return home / "logs" / f"{part.name}.log"


def runs(part: Component, state: State, progress: Progress) -> bool:
    """Whether a component's process is alive and answers, given some patience."""
    record = state.processes.get(part.name)
    if record is None or record.find() is None:
        return False
    # busy is not dead, and an interrupted `up` leaves a component that is still starting
    patience_s = max(15, part.deadline_s - (time.time() - record.created_s))

    def settled() -> bool:
        return record.find() is None or part.healthy()

    if not processes.wait_until(settled, SILENCE_S):
        progress(f"{part.name} lives and does not answer on {part.address}; waiting up to {patience_s:.0f} s")
        processes.wait_until(settled, patience_s)
    return record.find() is not None and part.healthy()


def start(home: Path, state: State, part: Component, progress: Progress) -> State:
    """Start a component and write it down at once, so that an interrupted start is found and stopped later."""
    for port in part.ports:
        if processes.port_taken(port):
            raise StackError(
                f"The port of {part.name} was taken by {processes.listener(port)} while it was away.",
                value=port,
                rule="a component comes back on its old port",
                mend="`darkroom down`, then `darkroom up`: other ports are chosen",
            )
    progress(f"starting {part.name} on {part.address}")
    part.prepare()
    record = processes.start(part.argv, mark=mark_of(home, part), environment=part.environment, log=log_of(home, part))
    state = state.with_process(part.name, record)
    state.write(home)
    return state


def clear(home: Path, state: State, part: Component, progress: Progress | None) -> State:
    """Clear away what is left of a component; the new state."""
    record = state.processes.get(part.name)
    if progress and record and record.find():
        progress(f"stopping {part.name}")
    processes.stop(record, mark_of(home, part), grace_s=part.grace_s)
    part.clean()
    state = state.with_process(part.name, None)
    state.write(home)
    return state


def await_health(home: Path, state: State, parts: Sequence[Component], progress: Progress, started: float) -> None:
    """Wait until all parts answer; they start at the same time.

    Raises:
        StackError: one ended or took too long. All of ``parts`` are stopped then.
    """
    waiting = list(parts)
    while waiting:
        for part in list(waiting):
            ended = state.processes[part.name].find() is None
            seconds = time.monotonic() - started
            if not ended and part.healthy():
                progress(f"{part.name} is ready after {seconds:.1f} s")
                waiting.remove(part)
            elif ended or seconds > part.deadline_s:
                for other in parts:
                    state = clear(home, state, other, progress)
                log = log_of(home, part)
                raise StackError(
                    f"{part.name} {'ended while it started' if ended else 'does not answer'}.",
                    value=part.address,
                    rule=f"answers within {part.deadline_s:.0f} s",
                    mend=f"the whole log is {log}; its last lines:\n{processes.tail(log)}",
                )
        time.sleep(0.2)
