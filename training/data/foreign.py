"""WebDataset shards that others made: indexed by a walk over their headers, then read like a data set of our own."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from filelock import FileLock
from PIL import Image

from training.data.ahead import ahead
from training.data.captions import canonical
from training.data.config import BuildConfig
from training.data.disk_cache import DiskCache, DiskCacheConfig
from training.data.foreign_index import PICTURES, Sample, Skipped, SplitIndex, samples
from training.data.foreign_split import ForeignDataset
from training.data.manifest import (
    MANIFEST,
    SPLITS,
    FileFacts,
    Manifest,
    SplitFacts,
    SplitName,
    content_hash,
    file_facts,
)
from training.data.planning import split_of
from training.data.shard_files import LocalShards, RemoteShards, ShardFiles
from training.data.storage import Folder, Stored
from training.errors import DataError

Progress = Callable[[int, int], None]
"""Told (shards done, shards in all)."""

_log = logging.getLogger(__name__)
_VERSION = 1
"""Of the indexes; another one makes them anew."""
_THREADS = 4
"""Shards that are walked at once: most of a walk waits for a disk or a network."""
TAR = ".tar"
SKIPPED = "skipped.jsonl"
"""In the index's folder, the members that are not used and why, one JSON object a line."""


def _silent(_done: int, _total: int) -> None:
    """No progress is shown."""


def shards_at(folder: Folder) -> list[Stored]:
    """The tars in a folder, sorted by name; none where an index says that ``darkroom data build`` was at work.

    Raises:
        StorageError: storage does not answer.
    """
    inside = [stored for stored in folder.files() if "/" not in stored.name]
    if any(stored.name.endswith(".index.npy") for stored in inside):
        return []
    return [stored for stored in inside if stored.name.endswith(TAR)]


def are_shards(folder: Folder) -> bool:
    """Whether a place is a tar, or a folder of tars that nobody has built with ``darkroom``.

    Raises:
        StorageError: storage does not answer.
    """
    return folder.place.endswith(TAR) or bool(shards_at(folder))


def open_foreign(
    place: str | Path | Sequence[str | Path],
    *,
    held_out: float = 0.0,
    cache: DiskCacheConfig | None = None,
    progress: Progress = _silent,
) -> ForeignDataset:
    """Shards that have no manifest, with an index that is made once and kept in the cache.

    A sample is a picture and, with the same name up to its first dot, its captions: ``.json``, ``.txt`` and ``.cls``.
    The index is found again by the shards' names, sizes and times or ETags. The hash names what the walk has seen:
    names, sizes and places of all members, and the pictures' first bytes, but not all of them.

    Args:
        place: a folder or URL, in which all tars are taken; or tars that lie in one folder or below it.
        held_out: share of the pictures kept away from training, each assigned by its own bytes as ``darkroom data
            build`` does it; other than 0, all pictures are read once.
        cache: where indexes, and blocks of remote shards, are kept.
        progress: told (shards done, shards in all).

    Raises:
        DataError: there are no shards, or no samples in them.
        StorageError: storage does not answer.
    """
    config = cache or DiskCacheConfig()
    folder, shards = _found(place)
    if not shards:
        rule = "tars, or a data set that `darkroom data build` made"
        raise DataError("There are no shards.", value=str(place), rule=rule)
    lines = [[shard.name, shard.size, shard.stamp] for shard in shards]
    key = hashlib.sha256(canonical([_VERSION, folder.place, held_out, lines])).hexdigest()
    kept = config.open()
    home = kept.folder / "foreign" / key[:32]
    files = _files(folder, shards, kept)
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_suffix(".lock")):  # the ranks of a node wait for the first one's walk
        if not (home / MANIFEST).is_file():
            _index(home, folder, shards, files, held_out, progress)
    manifest = Manifest.model_validate_json((home / MANIFEST).read_bytes())
    return ForeignDataset(folder, manifest, config, home, files)


def _found(place: str | Path | Sequence[str | Path]) -> tuple[Folder, list[Stored]]:
    if isinstance(place, str | Path):
        folder = Folder.at(place)
        if not folder.place.endswith(TAR):
            return folder, shards_at(folder)
        place = [place]
    places = [Folder.at(one).place for one in place]
    above = [one.rpartition("/")[0].split("/") for one in places]
    common = next((depth for depth, parts in enumerate(zip(*above, strict=False)) if len(set(parts)) > 1), None)
    root = "/".join(above[0][: min(map(len, above)) if common is None else common]) if above else ""
    if not root.strip("/") or root.endswith((":", ":/")):
        raise DataError("The shards have no folder in common.", value=places[:5], rule="all in one folder or below it")
    folder = Folder.at(root)
    try:
        return folder, [folder.stat(one[len(root) + 1 :]) for one in places]
    except FileNotFoundError as error:
        raise DataError("A shard is missing.", value=str(error), rule="every shard that is named") from error


def _files(folder: Folder, shards: Sequence[Stored], cache: DiskCache) -> ShardFiles:
    if folder.local is not None:
        return LocalShards(folder.local)
    return RemoteShards(folder, cache, {shard.name: (shard.size, f"{shard.size} {shard.stamp}") for shard in shards})


def _index(
    home: Path, folder: Folder, shards: Sequence[Stored], files: ShardFiles, held_out: float, progress: Progress
) -> None:
    """Walk all shards, and write the index and a manifest into ``home``, which appears when it is complete."""
    aside = home.with_name(f"{home.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        manifest = _walked(aside, shards, files, held_out, progress)
        if not manifest.kept:
            reasons = ", ".join(f"{count} {rule}" for rule, count in manifest.dropped.items())
            raise DataError(
                "The shards hold no samples that can be used.",
                value=folder.place,
                rule=f"pictures ({', '.join(sorted(PICTURES))}) with or without .json, .txt and .cls beside them"
                + (f"; left out were {reasons}" if reasons else ""),
            )
        (aside / MANIFEST).write_text(manifest.as_json(), encoding="utf-8")
        shutil.rmtree(home, ignore_errors=True)
        aside.rename(home)
        if manifest.dropped:
            count = sum(manifest.dropped.values())
            _log.warning("%d members of the shards are not used; %s says why.", count, home / SKIPPED)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _walked(home: Path, shards: Sequence[Stored], files: ShardFiles, held_out: float, progress: Progress) -> Manifest:
    dropped: Counter[str] = Counter()
    walked: dict[str, FileFacts] = {}
    without_caption = 0
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own pixel limit leaves them out
        splits = {name: stack.enter_context(SplitIndex(home, name)) for name in SPLITS}
        skipped = stack.enter_context((home / SKIPPED).open("w", encoding="utf-8"))

        def members(shard: Stored) -> list[Sample | Skipped]:
            return list(samples(partial(files.read, shard.name), shard.size, whole=held_out > 0.0))

        for number, (shard, walk) in enumerate(ahead(members, shards, _THREADS)):
            digest = hashlib.sha256()
            for found in walk.result():
                digest.update(found.seen())
                if isinstance(found, Sample):
                    splits[split_of(found.sha256, held_out) if held_out else "train"].add(number, found)
                    without_caption += not found.sidecars
                else:
                    dropped[found.finding.rule] += 1
                    about = {"shard": shard.name, "name": found.name, **asdict(found.finding)}
                    skipped.write(json.dumps(about) + "\n")
            walked[shard.name] = FileFacts(size_bytes=shard.size, sha256=digest.hexdigest())
            progress(number + 1, len(shards))
    names = tuple(shard.name for shard in shards)
    return _manifest(
        home, {name: index.facts(names) for name, index in splits.items()}, walked, dropped, without_caption
    )


def _manifest(
    home: Path,
    splits: dict[SplitName, SplitFacts],
    walked: dict[str, FileFacts],
    dropped: Counter[str],
    without_caption: int,
) -> Manifest:
    config = BuildConfig(held_out=0.0)
    files = {**walked, **{split.index: file_facts(home / split.index) for split in splits.values()}}
    kept = sum(split.count for split in splits.values())
    return Manifest(
        hash=content_hash(splits, files, config.background),
        config=config,
        source_digest=hashlib.sha256(canonical([facts.sha256 for facts in walked.values()])).hexdigest(),
        inputs=kept + dropped.total(),
        kept=kept,
        without_caption=without_caption,
        dropped=dict(sorted(dropped.items())),
        licences={},
        splits=splits,
        files=files,
    )
