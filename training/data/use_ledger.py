"""The ledger of use: what each optimizer step of a run has consumed, in a file that only grows.

``RUN/use/steps.bin`` is a header and records of one size, each with a checksum. A step's record holds its digest
(``use_digest``) and the running digest of all steps so far; the run's checkpoint holds the same running digest.
Before it come records of the samples that the step wanted and could not read. A run that goes on from a checkpoint
leaves what it did after that where it is and appends a record that says so: the steps are done again, and counted once.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.use_digest import Use
from training.errors import DataError, StorageError

FOLDER = "use"
STEPS = "steps.bin"
RECIPE = "recipe.json"
STEP, MISSING, RESUMED, LEFT_OUT = 1, 2, 3, 4
DTYPE = np.dtype(
    [
        ("kind", "<u4"),
        ("rows", "<u4"),
        ("missing", "<u4"),
        ("step", "<u8"),
        ("position", "<u8"),
        ("digest", "<u8", 2),
        ("running", "<u8", 2),
        ("check", "<u4"),
    ]
)
"""One record, 64 bytes.

``STEP``: optimizer step ``step`` (from 1) consumed ``rows`` rows of the global batch at ``position``, and ``missing``
could not be read. ``MISSING``: one of those, of the step that follows; ``digest`` is the sample's id and its epoch.
``LEFT_OUT``: after the step that follows, the updates of steps ``digest[0]`` to ``digest[1]`` were undone: their rows
were consumed and are not in the weights; ``RUN/left_out.jsonl`` says why. ``RESUMED``: the run went on after ``step``;
``digest`` begins with the last step known before. ``running`` is the running digest after the record, ``check`` the
CRC-32 of what is before it.
"""

_MAGIC = b"darkroom use 1\n\0"
_HEADER_SIZE = DTYPE.itemsize
_RUNNING_OF = 44
"""Bytes of a record that its running digest covers: kind to digest."""


@dataclass(frozen=True)
class UseState:
    """What a run has consumed so far.

    Attributes:
        step: optimizer steps done.
        digest: 32 hexadecimal digits over all of them, the same for every world size and however often it stopped.
        rows: rows trained on.
        missing: rows that could not be read.
    """

    step: int = 0
    digest: str = "0" * 32
    rows: int = 0
    missing: int = 0


def after(running: bytes, record: np.ndarray | np.void) -> bytes:
    """The running digest after a step's record."""
    return hashlib.blake2b(running + record.tobytes()[:_RUNNING_OF], digest_size=16).digest()


def is_sound(record: np.void) -> bool:
    """Whether a record is as it was written."""
    return bool(zlib.crc32(record.tobytes()[: -DTYPE["check"].itemsize]) == record["check"])


class UseLedger:
    """Writes the ledger; rank 0 of the run's only writer has one. Use ``UseLedger.open``."""

    def __init__(self, file: Any, path: Path, state: UseState) -> None:
        self._file, self._path, self.state = file, path, state

    @classmethod
    def open(
        cls, run_dir: Path, data_hash: str, state: UseState, *, anew: bool = False
    ) -> tuple[UseLedger, str | None]:
        """Go on after ``state``, which is a checkpoint's, or the fresh one.

        Args:
            run_dir: the run's folder.
            data_hash: the data set's name.
            state: what was consumed before.
            anew: drop what is there; it is of a run that had another recipe and left no checkpoint.

        Returns:
            The ledger, and what is wrong with the one that was found, for the user.

        Raises:
            StorageError: it cannot be written.
        """
        path = run_dir / FOLDER / STEPS
        header = _MAGIC + bytes.fromhex(data_hash)
        header += bytes(_HEADER_SIZE - len(header))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("r+b" if path.is_file() else "w+b", buffering=0)
            if file.read(_HEADER_SIZE) != header or anew:
                file.seek(0)
                file.write(header)
                # what is there is of a run that left no checkpoint; but where there is one, the header is all that
                # is damaged, and the records show for themselves whether they lead to it
                if anew or not state.step:
                    file.truncate()
                _flush_folders(path.parent)
        except OSError as error:
            raise _refused(path, error) from error
        ledger = cls(file, path, state)
        return ledger, ledger._resume()

    def _resume(self) -> str | None:
        """Cut a tail that a crash left half-written, and void what came after the checkpoint."""
        records = read(self._path)
        whole = len(records)
        while whole and not (is_sound(records[whole - 1]) and records[whole - 1]["kind"] in (STEP, RESUMED)):
            whole -= 1
        self._file.truncate(_HEADER_SIZE + whole * DTYPE.itemsize)
        self._file.seek(0, os.SEEK_END)
        last = records[whole - 1] if whole else np.zeros((), DTYPE)[()]
        known = int(last["step"]) if whole else 0
        if (known, _hex(last)) == (self.state.step, self.state.digest):
            return None
        resumed = _record(RESUMED, 0, 0, self.state.step, 0, (known, 0))
        self._write(_sealed(resumed, bytes.fromhex(self.state.digest)))
        self.flush()
        same = records[:whole]["step"] == self.state.step
        if self.state.step == 0 or any(_hex(record) == self.state.digest for record in records[:whole][same]):
            return None
        return (
            f"The ledger of use does not lead to the checkpoint of step {self.state.step}: `darkroom data audit` will"
            f" find no account of earlier steps in {self._path}."
        )

    def commit(
        self,
        step: int,
        position: int,
        use: Use,
        missing: list[tuple[int, int]],
        left_out: tuple[int, int] | None = None,
    ) -> None:
        """Append a step.

        Args:
            step: steps done, from 1.
            position: place in the stream of the first row of the global batch.
            use: what the rows of all ranks come to.
            missing: sample id and epoch of each row that could not be read.
            left_out: the first and the last step whose updates were undone after this one.

        Raises:
            StorageError: it cannot be written.
        """
        before = bytes.fromhex(self.state.digest)
        record = _record(STEP, use.rows, use.missing, step, position, use.digest)
        named = [] if left_out is None else [_record(LEFT_OUT, 0, 0, step, position, left_out)]
        named += [_record(MISSING, 0, 0, step, position, row) for row in missing]
        running = after(before, record)
        self._write(b"".join([*(_sealed(each, before) for each in named), _sealed(record, running)]))
        self.state = UseState(step, running.hex(), self.state.rows + use.rows, self.state.missing + use.missing)

    def keep_recipe(self, recipe: Mapping[str, Any]) -> None:
        """What an audit computes the run's schedule from; a run that goes on with another world has the same one.

        Raises:
            StorageError: it cannot be written.
        """
        path = self._path.with_name(RECIPE)
        aside = path.with_suffix(".partial")
        try:
            aside.write_text(json.dumps(recipe, indent=1, sort_keys=True))
            aside.replace(path)
        except OSError as error:
            raise _refused(path, error) from error

    def flush(self) -> None:
        """Everything is on disk when this returns; before a checkpoint names it.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _refused(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        try:
            if self._file.write(data) != len(data):
                raise OSError("no space for a whole record")
        except OSError as error:
            raise _refused(self._path, error) from error


def read(path: Path) -> np.ndarray:
    """The records of a ledger, mapped; a half-written last one is left out.

    Raises:
        DataError: there is none, or it is something else.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_SIZE)
        size = path.stat().st_size
    except OSError as error:
        raise DataError("There is no ledger of use.", value=str(path), rule=error.strerror) from error
    if not header.startswith(_MAGIC):
        raise DataError("This is not a ledger of use.", value=str(path), rule=f"a file that begins with {_MAGIC!r}")
    count = (size - _HEADER_SIZE) // DTYPE.itemsize
    if not count:
        return np.empty(0, DTYPE)
    return np.memmap(path, DTYPE, "r", _HEADER_SIZE, (count,))


def kept_recipe(run_dir: Path) -> dict[str, Any] | None:
    """What ``keep_recipe`` has kept; None where it is not there, or not whole."""
    try:
        found = json.loads((run_dir / FOLDER / RECIPE).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def data_hash_of(path: Path) -> str:
    """The data set that a ledger is of."""
    with path.open("rb") as file:
        return file.read(_HEADER_SIZE)[len(_MAGIC) : len(_MAGIC) + 32].hex()


def _record(kind: int, rows: int, missing: int, step: int, position: int, digest: tuple[int, int]) -> np.ndarray:
    return np.array((kind, rows, missing, step, position, digest, (0, 0), 0), DTYPE)


def _sealed(record: np.ndarray, running: bytes) -> bytes:
    record["running"] = np.frombuffer(running, "<u8")
    record["check"] = zlib.crc32(record.tobytes()[: -DTYPE["check"].itemsize])
    return record.tobytes()


def _hex(record: Any) -> str:
    digest: str = record["running"].tobytes().hex()
    return digest


def _flush_folders(folder: Path) -> None:
    """A new file's name is on disk, its new folder's as well."""
    for each in (folder, folder.parent):
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(
        "The ledger of use cannot be written.",
        value=str(path),
        rule=error.strerror or str(error),
        mend="make room, or mend the storage; the same command goes on from the newest checkpoint",
    )
