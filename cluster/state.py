"""``stack.json``: what a local stack started, and the lock that makes two callers take turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.components import Ports
from cluster.processes import ProcessRecord
from training.errors import StackError, UsageError

Progress = Callable[[str], None]
"""Is told one line about each thing that takes time."""


class State(BaseModel):
    """``stack.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    """The layout of this file."""
    ports: Ports
    """Kept after ``down``."""
    processes: dict[str, ProcessRecord]
    """By component name; empty after ``down``."""

    @classmethod
    def read(cls, home: Path) -> State | None:
        """The state of ``home``'s stack; None when there never was one.

        Raises:
            StackError: the file is damaged.
        """
        path = home / "stack.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise StackError(
                "The stack's state file is damaged.",
                value=str(path),
                rule=str(error.errors()[0]["msg"]),
                mend="stop its processes by hand if any are left, then remove the file",
            ) from error

    def write(self, home: Path) -> None:
        """Replace the file in one step."""
        aside = home / "stack.json.part"
        aside.write_text(self.model_dump_json(indent=2) + "\n")
        aside.replace(home / "stack.json")

    def with_process(self, name: str, record: ProcessRecord | None) -> State:
        """A copy that knows, or no longer knows, a component's process."""
        kept = {key: value for key, value in self.processes.items() if key != name}
        return State(ports=self.ports, processes={**kept, name: record} if record else kept)


def make_home(home: Path) -> None:
    """Make the folder that everything of a stack lies in.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(home, error) from error


def unusable(home: Path, error: OSError) -> UsageError:
    """What is said of a home that cannot be used."""
    return UsageError(
        "The home folder cannot be used.",
        value=str(home),
        rule=f"a folder that you may make and write to ({error.strerror or error})",
        options=("--home FOLDER", "DARKROOM_HOME=FOLDER", "neither: .darkroom here"),
    )


@contextlib.contextmanager
def locked(home: Path, progress: Progress | None) -> Iterator[None]:
    """Hold ``home``'s lock; makes ``home`` when it is missing.

    Raises:
        UsageError: ``home`` cannot be made or written to.
    """
    from filelock import FileLock, Timeout

    make_home(home)
    lock = FileLock(home / "stack.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            progress(f"waiting for another darkroom that starts or stops the stack of {home}")
        lock.acquire()
    except OSError as error:
        raise unusable(home, error) from error
    try:
        yield
    finally:
        lock.release()
