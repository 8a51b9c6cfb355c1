"""The rows of the manifests inside a folder or a tar, by picture, on disk: memory might not hold them."""

from __future__ import annotations

import json
import posixpath
import sqlite3
from collections.abc import Iterable, Iterator

from training.data.captions import Fields, canonical
from training.data.entries import Entry, printable
from training.data.findings import Finding
from training.data.rows import MANIFEST_NAMES, Row, rows
from training.data.sources.item import Item

_BATCH_ROWS = 1000


def is_manifest(name: str) -> bool:
    """Whether a file inside a folder or tar is read as a manifest."""
    return name.rpartition("/")[2].lower() in MANIFEST_NAMES


class KnownRows:
    """What manifests say about pictures that lie elsewhere in the same folder or tar."""

    def __init__(self) -> None:
        # without a name it is a file of its own that SQLite deletes; one reader at a time, in whatever thread
        self._rows = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._rows.execute("CREATE TABLE rows (picture TEXT, manifest TEXT, fields TEXT, taken INTEGER DEFAULT 0)")
        self._rows.execute("CREATE INDEX by_picture ON rows (picture)")
        self._rows.execute("BEGIN")

    def load(self, manifests: Iterable[Entry], url_field: str) -> Iterator[Item]:
        """Read manifests; the lines that are no rows are inputs that are refused by line.

        Several rows of one manifest for a picture all count. Where several manifests name a picture, the first one's
        rows do, in the order of ``MANIFEST_NAMES``; the others' are refused by line.

        Raises:
            DataError: nothing of a manifest can be understood.
            OSError: it cannot be read.
        """
        for entry in sorted(manifests, key=_rank):
            name, batch = entry.name, list[tuple[str, str, str]]()
            with entry.open() as file:
                for row in rows(name, file, url_field):
                    picture = printable(posixpath.normpath(posixpath.join(posixpath.dirname(name), row.path)))
                    finding = self._refusal(row, picture, name)
                    if finding is None:
                        batch.append((picture, name, canonical(dict(row.fields or {})).decode()))
                    else:
                        yield Item(f"{name}:{row.line}", finding=finding)
                    if len(batch) >= _BATCH_ROWS:
                        self._insert(batch)
                self._insert(batch)

    def _refusal(self, row: Row, picture: str, manifest: str) -> Finding | None:
        if row.finding is not None:
            return row.finding
        if not row.path:
            return Finding("bad_row", row.line, detail="inside a folder or tar a row names a file, by its path")
        if picture.startswith(("/", "../")):
            return Finding("outside_source", detail="only files inside the source are read")
        other = "SELECT 1 FROM rows WHERE picture = ? AND manifest != ? LIMIT 1"
        if self._rows.execute(other, (picture, manifest)).fetchone():
            return Finding("duplicate_row", detail=f"another manifest names {picture} too"[:200])
        return None

    def _insert(self, batch: list[tuple[str, str, str]]) -> None:
        self._rows.executemany("INSERT INTO rows (picture, manifest, fields) VALUES (?, ?, ?)", batch)
        batch.clear()

    def take(self, picture: str) -> list[Fields]:
        """The rows of a picture, in their order; what is never taken is ``left`` at the end."""
        found = self._rows.execute("SELECT fields FROM rows WHERE picture = ? ORDER BY rowid", (picture,)).fetchall()
        if found:
            self._rows.execute("UPDATE rows SET taken = 1 WHERE picture = ?", (picture,))
        return [json.loads(fields) for (fields,) in found]

    def left(self) -> Iterator[str]:
        """The pictures that rows name and nobody took, once for each row."""
        for (picture,) in self._rows.execute("SELECT picture FROM rows WHERE taken = 0 ORDER BY picture"):
            yield picture

    def close(self) -> None:
        """Delete it."""
        self._rows.close()


def _rank(entry: Entry) -> tuple[int, str]:
    return MANIFEST_NAMES.index(entry.name.rpartition("/")[2].lower()), entry.name
