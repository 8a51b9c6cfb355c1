"""From what the user names to a source: which kind it is, by its ending, or by what a folder holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from training.data.ahead import ahead
from training.data.entries import Entry, entry_at
from training.data.findings import Finding
from training.data.rows import ENDINGS
from training.data.sources.config import SourceConfig
from training.data.sources.folders import FolderPart
from training.data.sources.manifests import ManifestPart
from training.data.sources.part import Part, RefusedPart
from training.data.sources.source import KINDS, Source, unreadable_source
from training.data.sources.tars import ShardsPart, TarPart
from training.data.sources.tree import LocalTree, RemoteTree, Tree
from training.data.storage import Folder, is_remote
from training.errors import DataError, UsageError

SEPARATOR = "::"
"""Between the shards or manifests that make one source."""

_MAX_PLACES = 1_000_000
_ASKED_AT_ONCE = 32
"""Files of a pattern whose sizes a bucket is asked for at once."""
_LISTS = (*ENDINGS, ".txt")
_BESIDE = (
    *(".json", ".jsonl", ".txt", ".csv", ".tsv", ".md", ".rst", ".yaml", ".yml", ".toml", ".xml", ".html", ".log"),
    *(".npy", ".idx", ".index", ".sha256", ".md5", ".sum", ".lock", ".parquet"),
)
"""What may lie beside shards: indexes, statistics, licences. A data set of ours is such a folder."""
_OURS_BESIDE = frozenset({"contact_sheet.png", "LICENSE", "README", "NOTICE"})


def open_source(place: str | Path, config: SourceConfig | None = None) -> Source:
    """The source at a place.

    A place is a path or an ``s3://``, ``gs://`` or ``hf://`` URL: a folder of pictures, a folder that holds only tars
    or only Parquet files, a ``.tar``, a ``.jsonl``, ``.csv`` or ``.parquet`` manifest, or a ``.txt`` list of URLs.
    Several tars or manifests are named with braces (``shard-{000000..000012}.tar``) or with ``::`` between them.

    Raises:
        DataError: it is missing, of another kind, or cannot be read. That it holds nothing, iterating tells.
        StorageError: a bucket does not answer.
        UsageError: no such storage.
    """
    config = config or SourceConfig()
    text = str(place)
    try:
        places = [text] if _is_there(text) else list(itertools.islice(_expanded(text), _MAX_PLACES + 1))
        if len(places) > _MAX_PLACES:
            raise UsageError("The pattern names too many files.", value=text, rule=f"at most {_MAX_PLACES}")
        if len(places) > 1:
            return Source(text, tuple(_several(places, config)))
        return _one(places[0], config)
    except OSError as error:
        raise unreadable_source(text, error) from error


def _expanded(text: str) -> Iterator[str]:
    from braceexpand import braceexpand

    for part in text.split(SEPARATOR):
        try:
            yield from braceexpand(part, escape=False)
        except ValueError as error:
            raise UsageError("The pattern's braces do not match.", value=part, rule="name-{000..012}.tar") from error


def _is_there(text: str) -> bool:
    local = None if is_remote(text) else Folder.at(text).local
    return local is not None and local.exists()


def _one(text: str, config: SourceConfig) -> Source:
    ending = PurePosixPath(text).suffix.lower()
    whole = Folder.at(text)
    if whole.local is not None:
        if not whole.local.exists():
            raise DataError("The source of pictures does not exist.", value=text, options=KINDS)
        is_folder = whole.local.is_dir()
    else:
        is_folder = ending not in {".tar", *_LISTS}
    if is_folder:
        tree: Tree = LocalTree(whole.local) if whole.local else RemoteTree(whole.place)
        return Source(tree.place, tuple(_in_folder(tree, config)))
    file = entry_at(text)
    part = ManifestPart(file, config) if ending in _LISTS else TarPart(file, config)
    return Source(f"{file.root}/{file.file}", (part,))


def _several(places: list[str], config: SourceConfig) -> Iterator[Part]:
    wrong = next((place for place in places if PurePosixPath(place).suffix.lower() not in {".tar", *_LISTS}), None)
    if wrong is not None:
        raise UsageError("Only tars and manifests can be several.", value=wrong, options=[".tar", *_LISTS])
    threads = _ASKED_AT_ONCE if any(is_remote(place) for place in places) else 1
    yield from _set([begun.result() for _, begun in ahead(entry_at, places, threads)], config)


def _set(files: list[Entry], config: SourceConfig) -> Iterator[Part]:
    """The parts of several files, tars in one."""
    for is_tar, group in itertools.groupby(files, lambda file: file.name.lower().endswith(".tar")):
        if is_tar:
            yield ShardsPart(tuple(group), config)
        else:
            prefixes = ((file, file.name.rpartition("/")[0]) for file in group)
            yield from (ManifestPart(file, config, f"{above}/" if above else "") for file, above in prefixes)


def _in_folder(tree: Tree, config: SourceConfig) -> Iterator[Part]:
    """A folder that holds nothing but tars, or but Parquet files, and what belongs to them, is a set of these."""
    ending = _only(tree)
    if ending is None:
        yield FolderPart(tree, config)
        return
    refused: dict[str, Finding] = {}
    yield from _set(sorted(_files(tree, "", ending, refused), key=lambda entry: entry.name), config)
    if refused:
        yield RefusedPart(refused)


def _only(tree: Tree) -> str | None:
    found = set()
    for name in tree.names():
        lowered = name.lower()
        if lowered.endswith(".tar"):
            found.add(".tar")
        elif lowered.endswith(".parquet"):
            found.add(".parquet")
        elif not lowered.endswith(_BESIDE) and PurePosixPath(name).name not in _OURS_BESIDE:
            return None
    return ".tar" if ".tar" in found else ".parquet" if found else None


def _files(tree: Tree, inside: str, ending: str, refused: dict[str, Finding]) -> Iterator[Entry]:
    listing = tree.level(inside)
    refused.update(listing.refused)
    yield from (entry for name, entry in listing.entries.items() if name.lower().endswith(ending))
    for folder in listing.folders:
        if inside or folder != "encoded":  # a data set's own cache of latents
            yield from _files(tree, folder, ending, refused)
