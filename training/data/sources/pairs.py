"""Pictures and what lies beside them: sidecars by name, rows by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.data.entries import Entry, Listing
from training.data.findings import Finding
from training.data.sources.item import Item
from training.data.sources.known import KnownRows, is_manifest

SIDECARS = (".txt", ".json", ".cls")


def paired(listing: Listing, known: KnownRows | None, defaults: Mapping[str, Any] | None = None) -> list[Item]:
    """The pictures of a listing with their sidecars and rows, and the refused, sorted by name.

    Args:
        listing: a directory, or a whole tar.
        known: what manifests say; None where there are none.
        defaults: what the folders' names say about the pictures that no row knows.
    """
    sidecars = _sidecars(listing)
    orphans = {name for name in listing.entries if name.lower().endswith(SIDECARS)}
    items = []
    for name in sorted(listing.entries):
        if is_manifest(name) or name.lower().endswith(SIDECARS):
            continue
        stems = _stems(name)
        text, data, label = (_sidecar(stems, ending, sidecars) for ending in SIDECARS)
        orphans -= {beside.name for beside in (text, data, label) if beside is not None}
        rows = known.take(name) if known else []
        items += [Item(name, listing.entries[name], text, data, label, row) for row in rows]
        if not rows:
            items.append(Item(name, listing.entries[name], text, data, label, defaults=defaults))
    orphan = Finding("sidecar_without_image", detail="no picture of this name")
    items += [Item(name, finding=orphan) for name in orphans]
    for name, finding in listing.refused.items():
        items += [Item(name, finding=finding) for _ in range(max(1, len(known.take(name)) if known else 0))]
    return sorted(items, key=lambda item: item.name)


def _stems(name: str) -> tuple[str, ...]:
    """A picture's names without their endings: to the last dot, and to the first one as WebDataset has it."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.rpartition(".")
    last, first = stem if stem and dot else base, base.partition(".")[0] or base
    return (f"{folder}{slash}{last}",) if last == first else (f"{folder}{slash}{last}", f"{folder}{slash}{first}")


def _sidecars(listing: Listing) -> dict[str, Entry]:
    """The sidecars by their names with the ending in small letters: ``A.TXT`` belongs to ``A.JPG``."""
    found: dict[str, Entry] = {}
    for name in sorted(listing.entries):  # capitals sort first: of A.TXT and A.txt the latter stays
        stem, dot, ending = name.rpartition(".")
        if dot + ending.lower() in SIDECARS:
            found[stem + dot + ending.lower()] = listing.entries[name]
    return found


def _sidecar(stems: tuple[str, ...], ending: str, sidecars: dict[str, Entry]) -> Entry | None:
    for stem in stems:
        if stem + ending in sidecars:
            return sidecars[stem + ending]
    return None
