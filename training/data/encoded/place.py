"""Where the encodings of a data set lie: beside its images where that is a folder to write to."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from training.data.dataset import Dataset
from training.data.disk_cache import user_cache
from training.data.storage import Folder

FOLDER = "encoded"


@dataclass(frozen=True)
class Place:
    """Where files are read and written.

    Attributes:
        path: on a file system of this machine; read and written.
        origin: beside the images of a data set that lies behind a network or cannot be written to; files that are
            there already are fetched into ``path``. None where ``path`` is beside the images.
    """

    path: Path
    origin: Folder | None = None

    @property
    def folder(self) -> Folder:
        """``path`` with patient reads and typed errors."""
        return Folder.at(self.path)

    def child(self, name: str) -> Place:
        """A folder below, in both."""
        return Place(self.path / name, self.origin.child(name) if self.origin else None)


def place_of(dataset: Dataset) -> Place:
    """The place of a data set's encodings: the same for every process of a node, and for every trial of a sweep."""
    home = dataset.folder
    if home.local is not None and _writable(home.local):
        return Place(home.local / FOLDER)
    name = hashlib.sha256(home.place.encode()).hexdigest()[:32]
    return Place(user_cache() / FOLDER / name, origin=home.child(FOLDER))


def _writable(folder: Path) -> bool:
    inner = folder / FOLDER
    return os.access(inner if inner.is_dir() else folder, os.W_OK)
