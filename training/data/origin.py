"""Where a data set came from: whether the same source would give it again."""

from __future__ import annotations

import hashlib
import json
import os

from training.data.captions import Fields, canonical
from training.data.clean import CleanConfig
from training.data.findings import RefusedError
from training.data.manifest import Manifest
from training.data.progress import Progress, Step
from training.data.sources import Source
from training.data.storage import Folder

ORIGIN = "origin.json"
"""Where the source lay and when its files were written: says quickly that nothing changed; no part of the data set."""


def identity(name: str, sha256: str, fields: Fields | None) -> bytes:
    """What one input adds to a source's digest: its name, its picture and what is known about it, hashed."""
    return hashlib.sha256(canonical([name, sha256, fields])).digest()


def same_source(source: Source, out: Folder, manifest: Manifest, progress: Progress) -> bool:
    """Whether a data set was built from what ``source`` holds now.

    By the files' times if they are known, else by reading all pictures: a fresh copy of the source is the same. What
    may differ at each visit is not read.
    """
    try:
        origin = json.loads(out.read(ORIGIN))
    except (OSError, ValueError):
        origin = {}  # no part of the data set: without it, the pictures decide
    if isinstance(origin, dict) and origin.get("fingerprint") == source.fingerprint:
        return True
    if source.volatile or source.count() not in {None, manifest.inputs}:
        return False
    if _read(source, manifest.config.clean, progress) != manifest.source_digest:
        return False
    if out.local is None or os.access(out.local, os.W_OK):
        out.write(ORIGIN, origin_of(source))
    return True


def _read(source: Source, config: CleanConfig, progress: Progress) -> str:
    """The digest; reads every picture and decodes none."""
    seen = hashlib.sha256()
    for number, item in enumerate(source, start=1):
        try:
            image, fields = item.fetch(config)
        except RefusedError:
            seen.update(identity(item.name, "", None))
        else:
            seen.update(identity(item.name, hashlib.sha256(image).hexdigest(), fields))
        progress(Step("compare", number, source.count()))
    return seen.hexdigest()


def origin_of(source: Source) -> bytes:
    """The content of ``ORIGIN``: the source's place and fingerprint, for the next time."""
    place = os.fsencode(source.place).decode("utf-8", "replace")
    return json.dumps({"source": place, "fingerprint": source.fingerprint}).encode() + b"\n"
