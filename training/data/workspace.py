"""A build's work folder, ``OUT.building``: what a killed build had done is found again by the same request."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from training.data.clean import fingerprint
from training.data.config import BuildConfig
from training.data.storage import Folder
from training.errors import DataError

_REQUEST = "request.json"
_LOCK = "lock"
MADE = "made"
"""The new data set, until it takes its place."""

REPLACED = "replaced"
"""The old data set, while the new one takes its place."""

_FORMAT = 1
"""Of what lies in the folder; another one's work is not continued."""


@dataclass(frozen=True)
class Workspace:
    """The work folder of one build, held by it.

    Attributes:
        folder: where parts and notes lie, on storage that every worker sees.
        made: where the new data set's files go; on a local disk inside ``folder``, else already where they stay.
    """

    folder: Folder
    made: Folder

    @property
    def notes(self) -> Folder:
        """The folder of the notes about finished shards."""
        return self.folder.child("written")

    def parts(self, request: bytes) -> Folder:
        """The folder of the parts that were judged for a request.

        Each has its own: a worker that outlived another request's build must not leave anything among them.
        """
        return self.folder.child(f"judged-{hashlib.sha256(request).hexdigest()[:16]}")

    def clear(self) -> None:
        """Remove all that was done, the lock last: a folder without it would be somebody else's."""
        _empty(self.folder)
        if self.folder.local is not None:
            (self.folder.local / _LOCK).unlink(missing_ok=True)
            self.folder.local.rmdir()


def work_folder(out: Folder) -> Folder:
    """Beside the data set, so that a rename can bring the result there."""
    return Folder(f"{out.place.rstrip('/')}.building")


def request_of(source: str, config: BuildConfig) -> bytes:
    """What a work folder's content was made for: the source, the config and the files that the config names."""
    asked = {"format": _FORMAT, "source": source, "config": config.model_dump(mode="json")}
    return json.dumps({**asked, "rules": fingerprint(config.clean)}, sort_keys=True).encode() + b"\n"


@contextmanager
def opened(out: Folder) -> Iterator[Workspace]:
    """The work folder of ``out``, locked; it stays when the block ends, whatever ended it.

    Raises:
        DataError: another build holds it, or it is something else's.
        StorageError: storage refuses.
        OSError: likewise.
    """
    folder = work_folder(out)
    local = folder.local
    with _locked(folder):
        if local is None:
            yield Workspace(folder, out)
        else:
            yield Workspace(folder, folder.child(MADE))


def require_request(workspace: Workspace, request: bytes) -> bool:
    """Go on with what was done for the same request; what was done for another one is cleared first.

    Returns:
        Whether this is another try of the same request.

    Raises:
        DataError: an old data set lies there, because something else had taken its place.
        StorageError: storage refuses.
    """
    local = workspace.folder.local
    if local is not None and (local / REPLACED).exists() and (local / MADE).exists():
        raise DataError(
            "An older data set lies in the folder for unfinished work; it is left alone.",
            value=str(local / REPLACED),
            rule="it goes back to its place when nothing else is there",
            mend="move it where you want it, then run the same command again",
        )
    try:
        known = workspace.folder.read(_REQUEST)
    except FileNotFoundError:
        known = b""
    if known == request:
        return True
    _empty(workspace.folder)
    workspace.folder.write(_REQUEST, request)
    return False


def _empty(folder: Folder) -> None:
    if folder.local is None:
        for name in list(folder.names()):
            folder.remove(name)
        return
    for path in folder.local.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


@contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    """One build at a time; the kernel lets go of a dead one's lock. Of remote folders, this machine's builds know."""
    while True:
        path = _lock_path(folder)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    "Another build of the same data set is running.",
                    value=folder.place,
                    rule="one build of a data set at a time",
                    mend=f"wait for it; `fuser {path}` names the process",
                ) from error
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                yield
                return
            # the build that held it has just removed it with its folder


def _lock_path(folder: Folder) -> Path:
    if folder.local is None:
        name = hashlib.sha256(folder.place.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir(), f"darkroom-{os.getuid()}-{name}.lock")
    if folder.local.exists() and not (folder.local / _LOCK).is_file() and any(folder.local.iterdir()):
        raise DataError(
            "The folder for unfinished work holds something else; it is left alone.",
            value=folder.place,
            rule="a folder that a build made there",
            mend="choose another OUT, or move it away",
        )
    folder.local.mkdir(parents=True, exist_ok=True)
    return folder.local / _LOCK
