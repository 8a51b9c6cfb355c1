"""Where the checkpoints of a run are written: a folder of a file system, or of a bucket."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

from training.checkpoint import disk, manifest
from training.checkpoint.manifest import FileFacts, Manifest
from training.checkpoint.slab import Slab
from training.checkpoint.stored import STEP_FOLDER
from training.data.storage import Folder
from training.errors import CheckpointError

PARTIAL = "partial-"
Files = dict[str, FileFacts]


class Vault(Protocol):
    """Takes the files of every rank, and makes a checkpoint of them at once. Methods raise ``StorageError``."""

    def write(self, step: int, slab: Slab, rank: int, world: int) -> Files:
        """This rank's files of a step are in storage, and what they are; no reader sees them yet."""

    def commit(self, told: Manifest) -> Folder:
        """All files of a step are a checkpoint from now on. For rank 0, after all ranks have written theirs."""

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, whole or not, newest first."""

    def remove(self, step: int) -> None:
        """There is no checkpoint of that step any more."""

    def sweep(self) -> None:
        """Remove what crashes left behind. Only while nothing is being written."""


def open_vault(folder: Folder, token: str) -> Vault:
    """The vault at a place.

    Args:
        folder: of a run's checkpoints.
        token: names this attempt of the run, the same on every rank.
    """
    return DiskVault(folder.local, token) if folder.local is not None else BucketVault(folder, token)


class DiskVault:
    """A folder of a file system.

    A checkpoint's folder gets its name when every byte of it is on the disk.
    """

    def __init__(self, folder: Path, token: str) -> None:
        self._folder, self._token = folder, token

    def write(self, step: int, slab: Slab, rank: int, world: int) -> Files:
        """See ``Vault``."""
        partial = self._partial(step)
        files = {}
        with disk.reported(partial):
            disk.make_folder(partial)
            for kind in slab.layout.kinds:
                name = file_name(kind, rank, world)
                sha256, size = disk.write(partial / name, [slab.layout.header(kind), slab.bytes_of(kind)])
                files[name] = FileFacts(sha256=sha256, bytes=size)
            disk.flush_folder(partial)
        return files

    def commit(self, told: Manifest) -> Folder:
        """See ``Vault``."""
        partial, final = self._partial(told.step), self._folder / step_name(told.step)
        with disk.reported(final):
            disk.write(partial / manifest.NAME, [told.sealed()])
            disk.flush_folder(partial)
            if final.exists():  # damaged, or of a future that this run has left
                disk.remove_folder(final)
            partial.rename(final)
            disk.flush_folder(self._folder)
        return Folder.at(final)

    def steps(self) -> list[int]:
        """See ``Vault``."""
        with disk.reported(self._folder):
            return _numbers(path.name for path in self._folder.iterdir())

    def remove(self, step: int) -> None:
        """See ``Vault``."""
        path = self._folder / step_name(step)
        with disk.reported(path):
            if path.is_dir():
                disk.remove_folder(path)

    def sweep(self) -> None:
        """See ``Vault``."""
        with disk.reported(self._folder):
            for orphan in sorted(self._folder.glob(f"{PARTIAL}*")):
                shutil.rmtree(orphan)

    def _partial(self, step: int) -> Path:
        return self._folder / f"{PARTIAL}{step:08d}-{self._token}"


class BucketVault:
    """A folder of a bucket, where an object is whole or absent, and a checkpoint's manifest is its last object."""

    def __init__(self, folder: Folder, token: str) -> None:
        self._folder, self._token = folder, token

    def write(self, step: int, slab: Slab, rank: int, world: int) -> Files:
        """See ``Vault``."""
        files = {}
        with tempfile.TemporaryDirectory(prefix="darkroom-checkpoint-") as aside, disk.reported(aside):
            for kind in slab.layout.kinds:
                # another attempt's files of this step may still be on their way
                name = f"{self._token}/{file_name(kind, rank, world)}"
                path = Path(aside) / kind
                sha256, size = disk.write(path, [slab.layout.header(kind), slab.bytes_of(kind)])
                self._folder.upload(path, f"{step_name(step)}/{name}")
                path.unlink()
                files[name] = FileFacts(sha256=sha256, bytes=size)
        return files

    def commit(self, told: Manifest) -> Folder:
        """See ``Vault``."""
        self._folder.write(f"{step_name(told.step)}/{manifest.NAME}", told.sealed())
        return self._folder.child(step_name(told.step))

    def steps(self) -> list[int]:
        """See ``Vault``."""
        return _numbers(name.partition("/")[0] for name in self._folder.names("step-"))

    def remove(self, step: int) -> None:
        """See ``Vault``."""
        names = list(self._folder.names(f"{step_name(step)}/"))
        # without its manifest it is no checkpoint any more
        for name in sorted(names, key=lambda name: not name.endswith(f"/{manifest.NAME}")):
            self._folder.remove(name)

    def sweep(self) -> None:
        """See ``Vault``."""
        found: dict[str, list[str]] = {}
        for name in self._folder.names("step-"):
            step, slash, rest = name.partition("/")
            if slash and STEP_FOLDER.fullmatch(step):
                found.setdefault(step, []).append(rest)
        for step, names in found.items():
            used = self._used(step) if manifest.NAME in names else ()
            for name in names:
                if used is not None and name != manifest.NAME and name not in used:
                    self._folder.remove(f"{step}/{name}")

    def _used(self, step: str) -> Collection[str] | None:
        """The files that a manifest names; None where it is damaged, and so is what it knows."""
        place = f"{step}/{manifest.NAME}"
        try:
            return manifest.parse(self._folder.read(place), self._folder.url(place)).files
        except CheckpointError:
            return None


def _numbers(names: Iterable[str]) -> list[int]:
    return sorted({int(found[1]) for name in names if (found := STEP_FOLDER.fullmatch(name))}, reverse=True)


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def file_name(kind: str, rank: int, world: int) -> str:
    """The name of a rank's file."""
    return f"{kind}-{rank:05d}-of-{world:05d}.safetensors"
