"""Checkpoints as they lie in storage: found, checked and read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.checkpoint import manifest
from training.checkpoint.config import CheckpointConfig
from training.checkpoint.layout import Entry, entries_of
from training.checkpoint.manifest import Manifest
from training.data.storage import Folder
from training.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from training.checkpoint.source import PartsSource

STEP_FOLDER = re.compile(r"step-(\d{8,})")
CHUNK = 8 << 20
"""Bytes that are read or written at a time."""
_HEADER_LIMIT = 100 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: where its files lie.
        manifest: what they hold.
    """

    folder: Folder
    manifest: Manifest

    @property
    def path(self) -> str:
        """Its path or URL."""
        return self.folder.place

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def position(self) -> int:
        """Samples consumed of the global stream; with it the loader goes on."""
        return self.manifest.position

    @property
    def about(self) -> Mapping[str, Any]:
        """Recipe, code version, data hash and whatever else the run recorded."""
        return self.manifest.about

    def check(self, names: Collection[str] | None = None) -> None:
        """Hold files against their checksums, a chunk in memory at a time.

        Args:
            names: which files; all of them where it is None.

        Raises:
            CheckpointError: one is missing or altered; the message names it.
            StorageError: storage does not answer.
        """
        for name, expected in self.manifest.files.items():
            if names is not None and name not in names:
                continue
            if _sha256(self.folder, name, expected.bytes) != expected.sha256:
                raise _damaged(self.folder, name, expected)

    def source(self, kinds: Collection[str] | None = None) -> PartsSource:
        """The state, of which any range can be read.

        Args:
            kinds: the files that are opened, e.g. ``{"ema"}``; all where it is None.
        """
        from training.checkpoint.source import PartsSource

        parts = []
        for name in self.manifest.files:
            if kinds is None or kind_of(name) in kinds:
                fetch = _fetch(self.folder, name)
                parts += [(entry, fetch) for entry in _entries(self.folder, name)]
        return PartsSource(self.manifest.scalars, parts)

    def load(self, group: str) -> dict[str, torch.Tensor]:
        """The whole tensors of a group by name, e.g. of ``"weights"``, ``"ema"`` or ``"optimizer.exp_avg"``."""
        return self.source({group.partition(".")[0]}).whole(group)


def place(config: CheckpointConfig, run_dir: Path) -> Folder:
    """Where the checkpoints of a run lie."""
    if config.path is None:
        return Folder.at(run_dir / "checkpoints")
    return Folder.at(config.path).child(run_dir.parent.name).child(run_dir.name)


def kind_of(name: str) -> str:
    """Which of a rank's files a file's name means."""
    return name.rpartition("/")[2].partition("-")[0]


def found_in(folder: Folder | Path) -> Iterator[Checkpoint | CheckpointError]:
    """What is there, newest first: checkpoints whose files have the sizes that they should have, or what is wrong.

    Raises:
        StorageError: storage does not answer.
    """
    folder = folder if isinstance(folder, Folder) else Folder.at(folder)
    sizes: dict[str, dict[str, int]] = {}
    for stored in folder.files("step-"):
        step, slash, name = stored.name.partition("/")
        if slash and STEP_FOLDER.fullmatch(step):
            sizes.setdefault(step, {})[name] = stored.size
    for step in sorted(sizes, key=lambda name: int(name[5:]), reverse=True):
        try:
            yield _opened(folder.child(step), sizes[step])
        except CheckpointError as error:
            yield error


def newest(folder: Folder | Path, *, contents: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and why newer ones were passed over.

    Args:
        folder: where the run's checkpoints lie.
        contents: read every byte; otherwise only the manifest is, and the files' sizes are compared.

    Raises:
        StorageError: storage does not answer.
    """
    refused: list[str] = []
    for found in found_in(folder):
        try:
            if isinstance(found, CheckpointError):
                raise found
            if contents:
                found.check()
        except CheckpointError as error:
            refused.append(str(error))
        else:
            return found, refused
    return None, refused


def read(folder: Folder | Path) -> Checkpoint:
    """One checkpoint, whose every file has the recorded size and sha256.

    Raises:
        CheckpointError: a part is missing or altered; the message names it.
    """
    folder = folder if isinstance(folder, Folder) else Folder.at(folder)
    found = _opened(folder, {stored.name: stored.size for stored in folder.files()})
    found.check()
    return found


def _opened(folder: Folder, sizes: Mapping[str, int]) -> Checkpoint:
    try:
        told = manifest.parse(folder.read(manifest.NAME), folder.url(manifest.NAME))
    except FileNotFoundError:
        raise CheckpointError(
            "The checkpoint's manifest cannot be read: it is not there.",
            value=folder.url(manifest.NAME),
            rule="written last, when all else is in storage",
        ) from None
    for name in manifest.differing(told.files, sizes):
        raise _damaged(folder, name, told.files[name])
    return Checkpoint(folder, told)


def _damaged(folder: Folder, name: str, expected: manifest.FileFacts) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint is damaged: {name} is missing or altered.",
        value=folder.url(name),
        rule=f"{expected.bytes} bytes with sha256 {expected.sha256[:12]}...",
    )


def _sha256(folder: Folder, name: str, size: int) -> str | None:
    """Of a file of that size; None where it is not there."""
    found = hashlib.sha256()
    try:
        if folder.local is not None:
            with (folder.local / name).open("rb", buffering=0) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        for start in range(0, size, CHUNK):
            found.update(folder.read_range(name, start, min(CHUNK, size - start)))
    except FileNotFoundError:
        return None
    return found.hexdigest()


def _entries(folder: Folder, name: str) -> list[Entry]:
    length = int.from_bytes(folder.read_range(name, 0, 8), "little")
    if length > _HEADER_LIMIT:
        raise CheckpointError("A file's header is too long.", value=folder.url(name), rule=f"{_HEADER_LIMIT} bytes")
    try:
        return entries_of(json.loads(folder.read_range(name, 8, length)), 8 + length)
    except (ValueError, KeyError, TypeError):
        raise CheckpointError("A file's header cannot be read.", value=folder.url(name)) from None


def _fetch(folder: Folder, name: str) -> Callable[[Entry, int, int], torch.Tensor]:
    import torch

    def ranged(entry: Entry, start: int, stop: int) -> torch.Tensor:
        dtype = entry.dtype
        if start == stop:
            return torch.empty(0, dtype=dtype)
        data = bytearray((stop - start) * dtype.itemsize)
        first = entry.offset + start * dtype.itemsize
        for place in range(0, len(data), CHUNK):
            part = folder.read_range(name, first + place, min(CHUNK, len(data) - place))
            data[place : place + len(part)] = part
        return torch.frombuffer(data, dtype=dtype)

    return ranged
