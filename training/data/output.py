"""The folder that a build writes: found finished again, replaced by one rename, never half-written."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from pathlib import Path

from training.data.config import BuildConfig
from training.data.forgotten import FORGOTTEN
from training.data.manifest import MANIFEST, Manifest, check_files, read_manifest
from training.data.origin import ORIGIN, same_source
from training.data.progress import Progress
from training.data.sources import Source
from training.data.storage import Folder, is_remote
from training.data.workspace import MADE, REPLACED, Workspace, opened, work_folder
from training.errors import DataError, UsageError

CONTACT_SHEET = "contact_sheet.png"
"""What ``darkroom data show`` writes into a data set; no part of it."""

REPORT = "report.html"
"""What ``darkroom data report`` writes into a data set; no part of it either."""

ENCODED = "encoded"
"""The folder of what encoders made of a data set's shards; each file says of which one, so that it outlives a build."""

MADE_LATER = (CONTACT_SHEET, REPORT)
"""What shows a data set's pictures; may come and go."""

_OURS = re.compile(
    r"(train|held_out)-\d{6,}(\.\d+)?\.tar|(train|held_out)\.index(\.\d+)?\.npy|ledger(\.\d+)?\.parquet|"
    r"(manifest|origin|forgotten)\.json"
)

_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial")
"""A file that a ``Folder`` is writing."""


def refuse_unsafe_output(source: str | Path, out: str | Path) -> None:
    """Keep the source and the data set apart.

    Raises:
        UsageError: one is inside the other, so that building would change or delete its own input.
    """
    if is_remote(source) != is_remote(out):
        return
    here, there = (_steps(place) for place in (source, out))
    if here[: len(there)] == there or there[: len(here)] == here:
        raise UsageError(
            "The data set cannot lie inside its source, nor the source inside it.",
            value=str(out),
            rule=f"a folder apart from {source}",
        )


def _steps(place: str | Path) -> tuple[str, ...]:
    return tuple(Folder.at(place).place.split("/")) if is_remote(place) else Path(place).resolve().parts


def settle(out: Folder) -> None:
    """Put the old data set back where a killed build left neither it nor the new one in its place, first of all."""
    folder = work_folder(out).local
    if folder is not None and out.local is not None and (folder / REPLACED).is_dir():
        with opened(out):
            _put_back(folder, out.local)


def finished(source: Source, out: Folder, config: BuildConfig, progress: Progress, *, force: bool) -> Manifest | None:
    """The manifest that ``out`` already has for this source and config; None if it has to be built.

    Args:
        source: what is to be built.
        out: the data set's folder.
        config: how it is to be built.
        progress: told, if the source has to be read to compare it.
        force: whether anything but the undamaged result, checksums and all, has to be built again.

    Raises:
        DataError: ``out`` holds anything else and ``force`` is not set, or is no data set at all.
        OSError: ``out`` cannot be read.
        StorageError: likewise.
    """
    if not out.exists(MANIFEST):
        _require_room(out)
        return None
    try:
        manifest = read_manifest(out)
        check_files(out, manifest, checksums=force)
    except DataError:
        if force:
            return None
        raise
    if manifest.config == config and same_source(source, out, manifest, progress):
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


def _require_room(out: Folder) -> None:
    """The folder is new or empty; on remote storage, files of an unfinished data set may be there."""
    if out.local is None:
        foreign = next((name for name in out.names() if not is_ours(name)), None)
    else:
        foreign = next(iter(os.listdir(out.local)), None) if out.local.exists() else None  # noqa: PTH208 - a file raises
    if foreign is not None:
        raise DataError(
            "The output folder holds something that is not a data set; it is left alone.",
            value=str(out),
            rule="a new or empty folder, or a data set that was built there before",
            mend="choose another folder, or remove it yourself",
        )


def is_ours(name: str) -> bool:
    """Whether a data set's file can have this name."""
    return _OURS.fullmatch(name) is not None


def contents(out: Folder) -> dict[str, tuple[int, int, int]]:
    """What lies directly in a local folder: inode, size and time by name; nothing where there is no folder.

    Raises:
        OSError: it cannot be read.
    """
    if out.local is None or not out.local.is_dir():
        return {}
    facts = {path.name: path.lstat() for path in out.local.iterdir() if path.name not in {ORIGIN, ENCODED, *MADE_LATER}}
    return {name: (fact.st_ino, fact.st_size, fact.st_mtime_ns) for name, fact in facts.items()}


def generation_of(out: Folder) -> int:
    """The generation of the files that a build writes: not that of a data set on remote storage which stays readable.

    A local one is replaced as a whole, so that names may be the same.
    """
    if out.local is not None or not out.exists(MANIFEST):
        return 0
    try:
        return read_manifest(out).generation + 1
    except DataError:  # nobody can read it: its files may be written over
        return 0


def publish(workspace: Workspace, out: Folder, manifest: Manifest) -> None:
    """Make a data set on remote storage visible by its manifest; what was there before is removed.

    Raises:
        StorageError: storage refuses, or does not answer.
    """
    out.write(MANIFEST, manifest.as_json().encode())
    remove_others(out, manifest)
    workspace.clear()


def remove_others(out: Folder, manifest: Manifest, *, pictures: bool = True) -> int:
    """Remove a data set's files that its manifest does not name; how many.

    Args:
        out: the data set.
        manifest: what it holds.
        pictures: what was made to show its pictures, too.
    """
    count = 0
    for path in out.local.glob(".*.partial") if out.local else ():
        if _PARTIAL.fullmatch(path.name):  # of a write that was killed
            path.unlink(missing_ok=True)
            count += 1
    for name in list(out.names()):
        old = is_ours(name) and name not in {*manifest.files, MANIFEST, ORIGIN, FORGOTTEN}
        if old or (pictures and name in MADE_LATER):
            out.remove(name)
            count += 1
    return count


def take_place(workspace: Workspace, target: Path, before: dict[str, tuple[int, int, int]]) -> None:
    """The new data set takes the place of ``target`` by one rename, and the work folder vanishes.

    Args:
        workspace: its ``made`` holds the new data set and nothing else.
        target: what is replaced.
        before: its ``contents`` when it was decided to replace it.

    Raises:
        DataError: it holds something else by now.
        OSError: a folder cannot be renamed.
    """
    folder = Path(workspace.folder.place)
    made = folder / MADE
    try:
        for path in (*made.iterdir(), made):
            _to_disk(path)
        _swap(made, target, folder / REPLACED, before)
        _to_disk(target.parent)
        if (folder / REPLACED / ENCODED).is_dir():
            (folder / REPLACED / ENCODED).rename(target / ENCODED)
    except BaseException:
        _put_back(folder, target)
        raise
    workspace.clear()


def _swap(partial: Path, target: Path, replaced: Path, before: dict[str, tuple[int, int, int]]) -> None:
    """Rename, so that what appeared in ``target`` meanwhile is never lost: ``_put_back`` follows.

    The old folder is looked at after it was moved, when nobody can reach it by its name any more; onto a folder that
    is not empty the kernel renames nothing.
    """
    if before and target.exists():
        _require_quiet(target)
        target.rename(replaced)
        if contents(Folder.at(replaced)) != before:
            raise _changed(target)
    try:
        partial.rename(target)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise _changed(target) from error
        raise


def _require_quiet(target: Path) -> None:
    """Nobody takes samples out of the data set right now: what is half-done would go on in another folder."""
    descriptor = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _changed(target) from error
    finally:
        os.close(descriptor)


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


def _put_back(folder: Path, target: Path) -> None:
    """The old data set goes back if the new one did not take its place.

    If something else is in its place by now, both stay where they are: neither is ours to delete.
    """
    replaced = folder / REPLACED
    if replaced.exists() and (folder / MADE).exists() and not target.exists():
        replaced.rename(target)
