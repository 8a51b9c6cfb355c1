"""Take samples out of a finished data set: only the shards that hold them are written anew.

The new files have names of the next generation, so that what readers have open stays as it was; the manifest, written
in one step, makes the new data set of them. Whenever it is killed, there is the old data set or the new one, and the
same command ends what it began.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from training.data.forgotten import FORGOTTEN, Forgets, OptOut, opt_outs_json, read_opt_outs
from training.data.ledger import read_tables
from training.data.manifest import MANIFEST, Manifest, check_files, read_manifest
from training.data.output import ENCODED, MADE_LATER, remove_others
from training.data.rewriting import Found, Rewriting
from training.data.storage import Folder
from training.errors import DataError

_LOOKED_AT = ["kept", "rule", "sha256", "fields", "shard", "offset"]


@dataclass(frozen=True)
class Forgotten:
    """What was taken out, or would be.

    Attributes:
        inputs: rows of the ledger that fell under the opt-outs.
        samples: those of them that were in a shard.
        shards: the shards that held them.
        leftovers: files of an earlier, killed call that were removed.
        manifest: of the data set as it is now.
    """

    inputs: int
    samples: int
    shards: tuple[str, ...]
    leftovers: int
    manifest: Manifest


def forget(out: str | Path, opt_outs: Sequence[OptOut], *, dry_run: bool = False) -> Forgotten:
    """Take out of a data set what falls under opt-outs, and keep it out when the data set is built again there.

    In the ledger the rows stay, as dropped by the rule ``forgotten``, without their captions and fields. What was
    encoded of the shards, the report and the contact sheet are removed.

    Args:
        out: the data set.
        opt_outs: what is meant.
        dry_run: only tell.

    Raises:
        DataError: no data set there, or a damaged one; nothing to train on would be left; somebody else writes there.
        StorageError: storage refuses, or does not answer.
    """
    folder = Folder.at(out)
    with _locked(folder):
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        leftovers = 0 if dry_run else remove_others(folder, manifest, pictures=False)
        found = _find(folder, Forgets(tuple(opt_outs)))
        _require_rest(folder, manifest, found)
        samples = sum(len(offsets) for offsets in found.offsets.values())
        shards = tuple(sorted(found.offsets))
        if dry_run:
            return Forgotten(found.inputs, samples, shards, 0, manifest)
        known = read_opt_outs(folder)
        said = {(each.selector, each.value) for each in known}
        new = tuple(each for each in opt_outs if (each.selector, each.value) not in said)
        if new:
            folder.write(FORGOTTEN, opt_outs_json((*known, *new)))
        if not found.inputs:
            return Forgotten(0, 0, (), leftovers, manifest)
        made = _rewritten(folder, manifest, found, Forgets(tuple(opt_outs)))
        _remove_shown(folder, set(manifest.files) - set(made.files))  # first: a later call finds nothing to forget
        folder.write(MANIFEST, made.as_json().encode())
        remove_others(folder, made)
    return Forgotten(found.inputs, samples, shards, leftovers, made)


def _find(folder: Folder, forgets: Forgets) -> Found:
    inputs, offsets = 0, dict[str, list[int]]()
    for table in read_tables(folder, _LOOKED_AT):
        for row in table.to_pylist():
            if row["rule"] != "forgotten" and forgets(row):
                inputs += 1
                if row["kept"]:
                    offsets.setdefault(row["shard"], []).append(row["offset"])
    return Found(inputs, {name: np.array(sorted(found), np.int64) for name, found in offsets.items()})


def _require_rest(folder: Folder, manifest: Manifest, found: Found) -> None:
    """Something is left, which is looked at before any wish is noted: wishes that leave nothing forbid all builds.

    Raises:
        DataError: nothing is.
    """
    train = manifest.splits["train"]
    if sum(len(found.offsets.get(name, ())) for name in train.shards) == train.count:
        raise DataError(
            "Nothing would be left to train on.",
            value=str(folder),
            rule="a data set has at least one picture to train on",
            mend="remove the whole data set instead",
        )


def _rewritten(folder: Folder, manifest: Manifest, found: Found, forgets: Forgets) -> Manifest:
    """The files of the new data set, beside the old ones.

    Raises:
        DataError: the disk is full or gone.
        StorageError: storage refuses, or does not answer.
    """
    try:
        with Rewriting(folder, manifest, found, forgets) as rewriting:
            return rewriting.run()
    except OSError as error:
        raise DataError(
            "The shards without them could not be written; the data set is as it was.",
            value=str(error.filename or folder),
            rule=error.strerror or str(error),
            mend="make room, then run the same command again",
        ) from error


def _remove_shown(folder: Folder, shards: set[str]) -> None:
    """Remove what shows pictures, and what encoders made of shards that go; their files are called alike."""
    for name in MADE_LATER:
        folder.remove(name)
    stems = {PurePosixPath(name).stem for name in shards}
    for name in list(folder.names(f"{ENCODED}/")):
        if PurePosixPath(name).stem in stems:
            folder.remove(name)


@contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    """Keep other calls, and builds that would replace the folder, away meanwhile."""
    if folder.local is None or not folder.local.is_dir():
        yield
        return
    descriptor = os.open(folder.local, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(
            "Somebody else is writing to the data set.",
            value=str(folder),
            rule="one writer at a time",
            mend="run the same command again when it has ended",
        ) from error
    finally:
        os.close(descriptor)
