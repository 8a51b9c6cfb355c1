"""The folder that a build writes: found finished again, replaced by one rename, never half-written."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training.data.config import BuildConfig
from training.data.manifest import MANIFEST, Manifest, check_files, read_manifest
from training.data.sources import Source, digest
from training.errors import DataError, UsageError

ORIGIN = "origin.json"
"""Where the source lay and when its files were written: says quickly that nothing changed; no part of the data set."""

CONTACT_SHEET = "contact_sheet.png"
"""What ``darkroom data show`` writes into a data set; no part of it either."""

_MADE = "made"
"""The new data set, until it takes its place."""

_REPLACED = "replaced"
"""The old data set, while the new one takes its place."""

_LOCK = "lock"
"""Held by a living build in its own folder aside; the kernel lets go of a dead one's."""


def refuse_unsafe_output(source: Path, out: Path) -> None:
    """Keep the source and the data set apart.

    Raises:
        UsageError: one is inside the other, so that building would change or delete its own input.
    """
    here, there = source.resolve(), out.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise UsageError(
            "The data set cannot lie inside its source, nor the source inside it.",
            value=str(out),
            rule=f"a folder apart from {source}",
        )


def sweep(out: Path) -> None:
    """Clear what killed builds of the same folder left, first of all: it may be the old data set that was there.

    A living build holds the lock in its own.

    Raises:
        OSError: the folder around it cannot be read or written.
    """
    target = out.resolve()
    for leftover in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
        if not (leftover / _LOCK).is_file():
            continue
        with (leftover / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _clear(leftover, target)


def finished(
    source: Source, out: Path, config: BuildConfig, progress: Callable[[int, int], None], *, force: bool
) -> Manifest | None:
    """The manifest that ``out`` already has for this source and config; None if it has to be built.

    Args:
        source: what is to be built.
        out: the data set's folder.
        config: how it is to be built.
        progress: told (inputs done, inputs in all), if the source has to be read to compare it.
        force: whether anything but the undamaged result, checksums and all, has to be built again.

    Raises:
        DataError: ``out`` holds anything else and ``force`` is not set, or is no data set at all.
        OSError: ``out`` cannot be read.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise DataError(
            "The output folder holds something that is not a data set; it is left alone.",
            value=str(out),
            rule="a new or empty folder, or a data set that was built there before",
            mend="choose another folder, or remove it yourself",
        )
    try:
        manifest = read_manifest(out)
        check_files(out, manifest, checksums=force)
    except DataError:
        if force:
            return None
        raise
    if manifest.config == config and _same_source(source, out, manifest, progress):
        return manifest
    if force:
        return None
    what = "other pictures" if manifest.config == config else "another configuration"
    raise DataError(
        f"The output folder holds a data set that was built from {what}.",
        value=str(out),
        rule="the same command again finds its result; another one needs another folder",
        options=["another OUT", "--force replaces it"],
    )


def _same_source(source: Source, out: Path, manifest: Manifest, progress: Callable[[int, int], None]) -> bool:
    """By the files' times if they are known, else by reading all pictures: a fresh copy of the source is the same."""
    try:
        origin = json.loads((out / ORIGIN).read_bytes())
    except (OSError, ValueError):
        origin = {}  # written last and not part of the data set: without it, the pictures decide
    if isinstance(origin, dict) and origin.get("fingerprint") == source.fingerprint:
        return True
    if len(source.items) != manifest.inputs:
        return False
    if digest(source, manifest.config.clean, progress) != manifest.source_digest:
        return False
    if os.access(out, os.W_OK):
        note_origin(out, source)
    return True


def note_origin(folder: Path, source: Source) -> None:
    """Remember the source's place and fingerprint, for the next time."""
    origin = {"source": os.fsencode(source.path).decode("utf-8", "replace"), "fingerprint": source.fingerprint}
    aside = folder / f"{ORIGIN}.partial"
    aside.write_text(json.dumps(origin) + "\n", encoding="utf-8")
    aside.replace(folder / ORIGIN)


def contents(out: Path) -> dict[str, tuple[int, int, int]]:
    """What lies directly in a folder: inode, size and time by name; nothing where there is no folder.

    Raises:
        OSError: it cannot be read.
    """
    if not out.is_dir():
        return {}
    facts = {path.name: path.lstat() for path in out.iterdir() if path.name not in {ORIGIN, CONTACT_SHEET}}
    return {name: (fact.st_ino, fact.st_size, fact.st_mtime_ns) for name, fact in facts.items()}


@contextmanager
def replace_with(out: Path, before: dict[str, tuple[int, int, int]]) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well, and vanishes otherwise.

    Args:
        out: what is replaced.
        before: its ``contents`` when it was decided to replace it.

    Raises:
        DataError: it holds something else by now.
        OSError: the folder cannot be made or renamed.
    """
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        with (aside / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            partial = aside / _MADE
            partial.mkdir()
            yield partial
            for path in (*partial.iterdir(), partial):
                _to_disk(path)
            _take_place(partial, target, aside / _REPLACED, before)
            _to_disk(target.parent)
    finally:
        _clear(aside, target)


def _take_place(partial: Path, target: Path, replaced: Path, before: dict[str, tuple[int, int, int]]) -> None:
    """Rename, so that what appeared in ``target`` meanwhile is never lost: ``_clear`` puts ``replaced`` back.

    The old folder is looked at after it was moved, when nobody can reach it by its name any more; onto a folder that
    is not empty the kernel renames nothing.
    """
    if before and target.exists():
        target.rename(replaced)
        if contents(replaced) != before:
            raise _changed(target)
    try:
        partial.rename(target)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise _changed(target) from error
        raise


def _changed(target: Path) -> DataError:
    return DataError(
        "The output folder was changed while the data set was built; it is left alone.",
        value=str(target),
        rule="what lies there is replaced only if it is what lay there at the start",
        mend="look what it is, then run the same command again",
    )


def _to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk: a rename must not get there before what it renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no such promise for folders
            raise
    finally:
        os.close(descriptor)


def _clear(aside: Path, target: Path) -> None:
    """Remove a build's own folder; the old data set goes back if the new one did not take its place.

    If something else is in its place by now, the folder stays: neither is ours to delete.
    """
    replaced = aside / _REPLACED
    if replaced.exists() and (aside / _MADE).exists():
        if target.exists():
            return
        replaced.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
