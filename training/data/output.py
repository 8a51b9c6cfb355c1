"""The folder that a build writes: found finished again, replaced by one rename, never half-written."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.data.config import BuildConfig
from training.data.manifest import MANIFEST, Manifest, check_files, read_manifest
from training.data.sources import Source, digest
from training.errors import DataError, UsageError

ORIGIN = "origin.json"
"""Where the source lay and when its files were written: says quickly that nothing changed; no part of the data set."""

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


def finished(source: Source, out: Path, config: BuildConfig, *, force: bool) -> Manifest | None:
    """The manifest that ``out`` already has for this source and config; None if it has to be built.

    Raises:
        DataError: ``out`` holds anything else and ``force`` is not set, or is no data set at all.
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
        check_files(out, manifest)
    except DataError:
        if force:
            return None
        raise
    if manifest.config == config and _same_source(source, out, manifest):
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


def _same_source(source: Source, out: Path, manifest: Manifest) -> bool:
    """By the files' times if they are known, else by reading all pictures: a fresh copy of the source is the same."""
    try:
        origin = json.loads((out / ORIGIN).read_bytes())
    except (OSError, ValueError):
        origin = {}  # written last and not part of the data set: without it, the pictures decide
    if isinstance(origin, dict) and origin.get("fingerprint") == source.fingerprint:
        return True
    if len(source.items) != manifest.inputs or digest(source, manifest.config.clean) != manifest.source_digest:
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


@contextmanager
def replace_with(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        OSError: the folder cannot be made or renamed.
    """
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        with (aside / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            partial = aside / "made"
            partial.mkdir()
            yield partial
            if target.exists():
                target.rename(aside / "replaced")
            partial.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what killed builds of the same folder left; a living build holds the lock in its own."""
    for leftover in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
        if not (leftover / _LOCK).is_file():
            continue
        with (leftover / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(leftover, ignore_errors=True)
