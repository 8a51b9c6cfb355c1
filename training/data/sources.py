"""What a data set is built from: a folder, a tar, or a JSONL/CSV manifest, as one sorted list of inputs."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from training.data.captions import (
    MANIFEST_NAMES,
    MAX_SIDECAR_BYTES,
    Fields,
    Row,
    canonical,
    merged,
    rows,
    sidecar_fields,
)
from training.data.clean import CleanConfig, Finding, RefusedError, too_many_bytes
from training.data.entries import Entry, Listing, add_file, list_folder, list_tar, printable
from training.errors import DataError

_SIDECARS = (".txt", ".json")
_KINDS = ("a folder", "a .tar", "a .jsonl or .csv manifest")


@dataclass(frozen=True, slots=True)
class Item:
    """One input: a picture that can be fetched, or something that was refused by name.

    Attributes:
        name: the ledger's name for it, unique but for a manifest's rows that name a picture twice.
        image: the encoded picture; None where there is a finding.
        text: its ``.txt`` sidecar.
        json: its ``.json`` sidecar.
        row: its row in a manifest, which is laid over the sidecars; a picture with five rows is five inputs.
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
            data = self.image.read()
            beside = sidecar_fields(_read_sidecar(self.text), _read_sidecar(self.json))
        except OSError as error:
            raise RefusedError(Finding("unreadable", detail=f"{error.strerror or error}"[:200])) from error
        return data, beside if self.row is None else merged(beside, self.row.fields or {})


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

    In a folder or tar, a picture's captions come from its sidecars and from the manifests in any folder, whose rows
    name pictures relative to the manifest's own folder. A manifest that is itself the source is all that is read:
    its pictures' sidecars are not.

    Raises:
        DataError: it is missing, of another kind, cannot be read, or holds nothing.
    """
    try:
        if not path.exists():
            raise DataError("The source of pictures does not exist.", value=str(path), options=_KINDS)
        where, suffix = path.resolve(), path.suffix.lower()
        if path.is_dir():
            listing = list_folder(where)
            items = _paired(listing)
        elif suffix in {".jsonl", ".csv"}:
            listing = Listing()
            items = list(_from_rows(where.parent, path.name, where.read_bytes(), listing))
        else:
            listing = list_tar(where)
            items = _paired(listing)
        own = "" if path.is_dir() else f"{where.stat().st_size} {where.stat().st_mtime_ns}"
    except OSError as error:
        raise DataError("The source cannot be read.", value=str(path), rule=error.strerror, options=_KINDS) from error
    if not items:
        raise DataError("The source holds no pictures.", value=str(path), rule="at least one input", options=_KINDS)
    seen = hashlib.sha256(f"{where}\n{own}\n{sorted(listing.refused)}\n".encode("utf-8", "replace"))
    for entry in _sorted(listing):
        seen.update(f"{entry.name} {entry.size} {entry.start} {entry.changed_ns}\n".encode())
    return Source(where, tuple(items), seen.hexdigest())


def identity(name: str, sha256: str, fields: Fields | None) -> bytes:
    """What one input adds to a source's digest: its name, its picture and what is known about it."""
    return canonical([name, sha256, fields]) + b"\n"


def digest(source: Source, config: CleanConfig, progress: Callable[[int, int], None]) -> str:
    """Sha256 over all inputs' identities; reads every picture and decodes none.

    Args:
        source: what to read.
        config: pictures above its ``max_bytes`` are not read.
        progress: told (inputs done, inputs in all).
    """
    seen = hashlib.sha256()
    for number, item in enumerate(source.items, start=1):
        try:
            image, fields = item.fetch(config)
        except RefusedError:
            seen.update(identity(item.name, "", None))
        else:
            seen.update(identity(item.name, hashlib.sha256(image).hexdigest(), fields))
        progress(number, len(source.items))
    return seen.hexdigest()


def _sorted(listing: Listing) -> list[Entry]:
    return [listing.entries[name] for name in sorted(listing.entries)]


def _stems(name: str) -> tuple[str, ...]:
    """A picture's names without their endings: to the last dot, and to the first one as WebDataset has it."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")), str(path.with_name(path.name.split(".")[0] or path.name))


def _paired(listing: Listing) -> list[Item]:
    """The pictures of a folder or tar with their sidecars and manifest rows, and the refused, sorted by name."""
    known, items = _manifest_rows(listing)
    sidecars = _sidecars(listing)
    orphans = {entry.name for entry in _sorted(listing) if entry.name.lower().endswith(_SIDECARS)}
    for entry in _sorted(listing):
        if _is_manifest(entry.name) or entry.name.lower().endswith(_SIDECARS):
            continue
        text, data = (_sidecar(entry.name, ending, sidecars) for ending in _SIDECARS)
        orphans -= {beside.name for beside in (text, data) if beside is not None}
        items += [Item(entry.name, entry, text, data, row) for row in known.pop(entry.name, [None])]
    orphan = Finding("sidecar_without_image", detail="no picture of this name")
    items += [Item(name, finding=orphan) for name in orphans]
    items += [Item(name, finding=finding) for name, finding in listing.refused.items()]
    missing = Finding("missing_file", detail="named by the manifest, not in the source")
    items += [Item(name, finding=missing) for name in known if name not in listing.refused for _ in known[name]]
    return sorted(items, key=lambda item: item.name)


def _sidecars(listing: Listing) -> dict[str, Entry]:
    """The sidecars by their names with the ending in small letters: ``A.TXT`` belongs to ``A.JPG``."""
    found: dict[str, Entry] = {}
    for entry in _sorted(listing):  # capitals sort first: of A.TXT and A.txt the latter stays
        stem, dot, ending = entry.name.rpartition(".")
        if dot + ending.lower() in _SIDECARS:
            found[stem + dot + ending.lower()] = entry
    return found


def _sidecar(picture: str, ending: str, sidecars: dict[str, Entry]) -> Entry | None:
    return next((sidecars[stem + ending] for stem in _stems(picture) if stem + ending in sidecars), None)


def _is_manifest(name: str) -> bool:
    return PurePosixPath(name).name.lower() in MANIFEST_NAMES


def _manifest_rows(listing: Listing) -> tuple[dict[str, list[Row | None]], list[Item]]:
    """The rows of the manifests inside a folder or tar, by picture, and the lines that are no rows.

    Several rows of one manifest for a picture all count. Where several manifests name a picture, the first one's rows
    do, in the order of ``MANIFEST_NAMES``; the others' are refused by line.

    Raises:
        DataError: nothing of a manifest can be understood.
        OSError: it cannot be read.
    """
    known: dict[str, list[Row | None]] = {}
    bad: list[Item] = []
    manifests = [name for name in listing.entries if _is_manifest(name)]
    for name in sorted(manifests, key=lambda name: (MANIFEST_NAMES.index(PurePosixPath(name).name.lower()), name)):
        named: dict[str, list[Row | None]] = {}
        for row in rows(name, listing.entries[name].read()):
            path = printable(posixpath.normpath(posixpath.join(posixpath.dirname(name), row.path)))
            finding = row.finding
            if finding is None and path.startswith(("/", "../")):
                finding = Finding("outside_source", detail="only files inside the source are read")
            elif finding is None and path in known:
                finding = Finding("duplicate_row", detail=f"another manifest names {path} too"[:200])
            if finding is None:
                named.setdefault(path, []).append(row)
            else:
                bad.append(Item(f"{name}:{row.line}", finding=finding))
        known.update(named)
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
