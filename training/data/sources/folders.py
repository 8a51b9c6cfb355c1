"""Pictures in folders, with sidecars, manifests in any folder, or the Hugging Face ``imagefolder`` layout.

The layout's rule: where the source's own folder (or a split's, such as ``train/``) holds no pictures itself, no
manifest, and two folders or more, these are classes. A picture below one has its name as ``label``, and a split
folder's as ``split``, unless a manifest lies on the picture's path, or its sidecar says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from training.data.captions import Fields
from training.data.entries import Entry, Listing, printable
from training.data.findings import Finding
from training.data.sources.config import SourceConfig
from training.data.sources.item import Item
from training.data.sources.known import KnownRows, is_manifest
from training.data.sources.pairs import paired
from training.data.sources.part import Seen, tell, unseen
from training.data.sources.tree import Tree

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
"""Folders that are splits and no classes, and what the Hub calls them."""

PICTURES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
"""Endings that say picture; whether a file is one, its bytes tell."""


@dataclass(frozen=True)
class _Place:
    """Where among splits and classes a folder is."""

    split: str | None = None
    label: str | None = None
    may_divide: bool = True

    @property
    def defaults(self) -> Fields | None:
        """What is known about a picture here."""
        known = {"split": self.split, "label": self.label}
        return {key: value for key, value in known.items() if value is not None} or None


@dataclass(frozen=True)
class FolderPart:
    """All pictures below a folder, in the order of their paths."""

    tree: Tree
    config: SourceConfig
    volatile: bool = False
    listed_cheaply: bool = True

    def items(self, seen: Seen = unseen) -> Iterator[Item]:
        """See ``Part``. Bad lines of manifests come first, rows without a picture last."""
        manifests = [name for name in self.tree.names() if is_manifest(name)]
        known = KnownRows() if manifests else None
        try:
            if known:
                yield from known.load(self._entries(manifests), self.config.url_field)
            yield from self._below("", _Place(may_divide=self.config.folder_labels), known, seen)
            missing = Finding("missing_file", detail="named by the manifest, not in the source")
            yield from (Item(name, finding=missing) for name in (known.left() if known else ()))
        finally:
            if known:
                known.close()

    def stamps(self) -> Iterator[str]:
        """See ``Part``: nothing is known without a listing."""
        return iter(())

    def _entries(self, names: list[str]) -> Iterator[Entry]:
        for folder in sorted({name.rpartition("/")[0] for name in names}):
            entries = self.tree.level(folder).entries
            yield from (entry for name, entry in entries.items() if is_manifest(name))

    def _below(self, inside: str, place: _Place, known: KnownRows | None, seen: Seen) -> Iterator[Item]:
        listing = self.tree.level(inside)
        tell(listing, seen)
        if any(is_manifest(name) for name in listing.entries):
            place = replace(place, label=None, may_divide=False)
        items: dict[str, list[Item]] = {}
        for item in paired(listing, known, place.defaults):
            items.setdefault(item.name, []).append(item)
        # a folder sorts as its files' paths do: with the slash that follows it in them
        folders = {f"{printable(folder)}/": folder for folder in listing.folders}
        for name in sorted([*items, *folders]):
            yield from items.get(name, ())
            if name in folders:
                yield from self._below(folders[name], _within(place, listing, folders[name]), known, seen)


def _within(place: _Place, listing: Listing, folder: str) -> _Place:
    """The place of one folder of a listing."""
    names = [PurePosixPath(name).name for name in listing.folders]
    name = printable(PurePosixPath(folder).name)
    if not place.may_divide or any(entry.lower().endswith(PICTURES) for entry in listing.entries):
        return replace(place, may_divide=False)
    if place.split is None and all(each.lower() in SPLITS for each in names):
        return _Place(split=SPLITS[name.lower()])
    return replace(place, label=name if len(names) > 1 else None, may_divide=False)
