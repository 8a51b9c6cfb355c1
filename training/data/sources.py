"""What a data set is built from: a folder, a tar, or a JSONL/CSV manifest, as one sorted list of inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from training.data.captions import MANIFEST_NAMES, MAX_SIDECAR_BYTES, Fields, Row, canonical, rows, sidecar_fields
from training.data.clean import CleanConfig, Finding, RefusedError, too_many_bytes
from training.data.entries import Entry, Listing, add_file, list_folder, list_tar, printable
from training.errors import DataError

_SIDECARS = (".txt", ".json")
_KINDS = ("a folder", "a .tar", "a .jsonl or .csv manifest")


@dataclass(frozen=True)
class Item:
    """One input: a picture that can be fetched, or something that was refused by name.

    Attributes:
        name: the ledger's name for it, unique but for a manifest's rows that name a picture twice.
        image: the encoded picture; None where there is a finding.
        text: its ``.txt`` sidecar.
        json: its ``.json`` sidecar.
        row: its row in a manifest, which replaces the sidecars.
        finding: why it is refused already.
    """

    name: str
    image: Entry | None = None
    text: Entry | None = None
    json: Entry | None = None
    row: Row | None = None
    finding: Finding | None = None

    def fetch(self, config: CleanConfig) -> tuple[bytes, Fields]:
        """The encoded picture and what is known about it.

        Raises:
            RefusedError: too large, unreadable, or with a damaged sidecar.
        """
        if self.finding is not None or self.image is None:
            raise RefusedError(self.finding or Finding("missing_file"))
        excess = too_many_bytes(self.image.size, config)
        if excess is not None:
            raise RefusedError(excess)
        try:
            if self.row is not None:
                return self.image.read(), dict(self.row.fields or {})
            return self.image.read(), sidecar_fields(_read_sidecar(self.text), _read_sidecar(self.json))
        except OSError as error:
            raise RefusedError(Finding("unreadable", detail=f"{error.strerror or error}"[:200])) from error


def _read_sidecar(entry: Entry | None) -> bytes | None:
    if entry is None:
        return None
    if entry.size > MAX_SIDECAR_BYTES:
        raise RefusedError(Finding("bad_sidecar", entry.size, MAX_SIDECAR_BYTES, f"{entry.name} is too large"))
    return entry.read()


@dataclass(frozen=True)
class Source:
    """The inputs of one data set.

    Attributes:
        path: what the user named, resolved.
        items: every input, in the order of the ledger.
        fingerprint: changes when a file is added, removed or written; reads no picture.
    """

    path: Path
    items: tuple[Item, ...]
    fingerprint: str


def open_source(path: Path) -> Source:
    """List a source's inputs.

    Raises:
        DataError: it is missing, of another kind, cannot be read, or holds nothing.
    """
    if not path.exists():
        raise DataError("The source of pictures does not exist.", value=str(path), options=_KINDS)
    where, suffix = path.resolve(), path.suffix.lower()
    try:
        if path.is_dir():
            listing = list_folder(where)
            items = list(_paired(listing))
        elif suffix in {".jsonl", ".csv"}:
            listing = Listing()
            items = list(_from_rows(where.parent, path.name, where.read_bytes(), listing))
        else:
            listing = list_tar(where)
            items = list(_paired(listing))
    except OSError as error:
        raise DataError("The source cannot be read.", value=str(path), rule=error.strerror, options=_KINDS) from error
    if not items:
        raise DataError("The source holds no pictures.", value=str(path), rule="at least one input", options=_KINDS)
    stamps = "\n".join(f"{entry.name} {entry.size} {entry.stamp}" for entry in _sorted(listing))
    own = "" if path.is_dir() else f"{where.stat().st_size} {where.stat().st_mtime_ns}"
    digest = hashlib.sha256(f"{where}\n{own}\n{stamps}\n{sorted(listing.refused)}".encode("utf-8", "replace"))
    return Source(where, tuple(items), digest.hexdigest())


def identity(name: str, sha256: str, fields: Fields | None) -> bytes:
    """What one input adds to a source's digest: its name, its picture and what is known about it."""
    return canonical([name, sha256, fields]) + b"\n"


def digest(source: Source, config: CleanConfig) -> str:
    """Sha256 over all inputs' identities; reads every picture and decodes none."""
    seen = hashlib.sha256()
    for item in source.items:
        try:
            image, fields = item.fetch(config)
        except RefusedError:
            seen.update(identity(item.name, "", None))
        else:
            seen.update(identity(item.name, hashlib.sha256(image).hexdigest(), fields))
    return seen.hexdigest()


def _sorted(listing: Listing) -> list[Entry]:
    return [listing.entries[name] for name in sorted(listing.entries)]


def _stems(name: str) -> tuple[str, ...]:
    """A picture's names without their endings: to the last dot, and to the first one as WebDataset has it."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")), str(path.with_name(path.name.split(".")[0] or path.name))


def _paired(listing: Listing) -> Iterator[Item]:
    """The pictures of a folder or tar with their sidecars and manifest rows, sorted by name, then the refused."""
    known, items = _manifest_rows(listing)
    manifests = {name for name in listing.entries if name in MANIFEST_NAMES}
    sidecars = {name for name in listing.entries if name.lower().endswith(_SIDECARS)}
    used: set[str] = set()
    for entry in _sorted(listing):
        if entry.name in manifests or entry.name in sidecars:
            continue
        pair = {ending: _sidecar(entry.name, ending, sidecars) for ending in _SIDECARS}
        used |= set(pair.values()) - {""}
        text, data = (listing.entries.get(pair[ending]) for ending in _SIDECARS)
        items.append(Item(entry.name, image=entry, text=text, json=data, row=known.pop(entry.name, None)))
    orphan = Finding("sidecar_without_image", detail="no picture of this name")
    items += [Item(name, finding=orphan) for name in sidecars - used]
    items += [Item(name, finding=finding) for name, finding in listing.refused.items()]
    missing = Finding("missing_file", detail="named by the manifest, not in the source")
    items += [Item(name, finding=missing) for name in known if name not in listing.refused]
    return iter(sorted(items, key=lambda item: item.name))


def _sidecar(picture: str, ending: str, sidecars: set[str]) -> str:
    return next((stem + ending for stem in _stems(picture) if stem + ending in sidecars), "")


def _manifest_rows(listing: Listing) -> tuple[dict[str, Row], list[Item]]:
    """The rows of the manifests inside a folder or tar, by picture, and the lines that are no rows."""
    known: dict[str, Row] = {}
    bad: list[Item] = []
    for name in MANIFEST_NAMES:
        if name not in listing.entries:
            continue
        for row in rows(name, listing.entries[name].read()):
            if row.finding is not None:
                bad.append(Item(f"{name}:{row.line}", finding=row.finding))
            else:
                known.setdefault(printable(str(PurePosixPath(row.path))), row)
    return known, bad


def _from_rows(root: Path, name: str, data: bytes, listing: Listing) -> Iterable[Item]:
    """The rows of a manifest that is itself the source, in its own order; pictures lie in its folder."""
    for row in rows(name, data):
        if row.finding is not None:
            yield Item(f"{name}:{row.line}", finding=row.finding)
            continue
        relative = str(PurePosixPath(row.path))
        picture = printable(relative)
        if picture not in listing.entries and picture not in listing.refused:
            add_file(listing, root, relative)
        if picture in listing.entries:
            yield Item(picture, image=listing.entries[picture], row=row)
        else:
            yield Item(picture, finding=listing.refused[picture])
