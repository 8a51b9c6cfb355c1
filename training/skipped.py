"""Samples that could not be read, named once each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.errors import StorageError
from training.spec import Emit

FILE = "skipped.jsonl"
MOST = 5
"""So many are named in warnings; the file names all."""


@dataclass(frozen=True, order=True)
class MissingRow:
    """A row of a global batch that was left out.

    Attributes:
        sample_id: the sample's place in its split's index.
        epoch: how often it was due before.
        reason: why it cannot be read.
    """

    sample_id: int
    epoch: int
    reason: str

    def name(self, split: str) -> str:
        """As messages call it."""
        return f"{split}[{self.sample_id}]"


def reasons(run_dir: Path) -> Iterator[tuple[int, str]]:
    """Sample ids and why they cannot be read, as a run has noted them."""
    for line in _lines(run_dir / FILE):
        yield int(line["sample_id"]), str(line["reason"])


class SkippedSamples:
    """Keeps ``RUN/skipped.jsonl``, a line per sample, and warns of the first few. For rank 0.

    Args:
        run_dir: the run's folder.
        split: the split's name.
        step: the step that the run goes on from; what was met after it will be met again.
        emit: takes the warnings.

    Raises:
        StorageError: the file cannot be read or written.
    """

    def __init__(self, run_dir: Path, split: str, step: int, emit: Emit) -> None:
        self._path, self._split, self._emit = run_dir / FILE, split, emit
        try:
            kept = [line for line in _lines(self._path) if line["step"] <= step]
            aside = self._path.with_suffix(".partial")
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            aside.replace(self._path)
        except OSError as error:
            raise _refused(self._path, error) from error
        self._known = {int(line["sample_id"]) for line in kept}
        self._told = len(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, step: int, rows: list[MissingRow]) -> None:
        """Take note of the rows that a step left out; a sample that is known already is not told again.

        Raises:
            StorageError: the file cannot be written.
        """
        fresh = [row for row in rows if row.sample_id not in self._known]
        if not fresh:
            return
        lines = [{"sample": row.name(self._split), "step": step, **asdict(row)} for row in fresh]
        try:
            with self._path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise _refused(self._path, error) from error
        self._known.update(row.sample_id for row in fresh)
        for row in fresh[: max(0, MOST - self._told)]:
            self._warn(f"{row.name(self._split)} is left out, for it cannot be read: {row.reason}")
        self._told += len(fresh)

    def close(self) -> None:
        """Say how many there were in all."""
        if self._known:
            self._warn(f"{len(self)} samples of {self._split} could not be read; {self._path} names them.")

    def _warn(self, message: str) -> None:
        self._emit({"event": "warning", "message": message})


def _lines(path: Path) -> list[dict[str, Any]]:
    """What an earlier process noted; a line that a crash left half-written will be noted again."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(
        "The list of samples that were left out cannot be written.",
        value=str(path),
        rule=error.strerror,
        mend="make room, or mend the storage; the same command goes on from the newest checkpoint",
    )
