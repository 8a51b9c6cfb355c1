"""The inputs of one data set, as a stream that is the same each time."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from training.data.sources.item import Item
from training.data.sources.part import Part
from training.errors import DataError

KINDS = (
    "a folder",
    "a .tar, or a folder or pattern of them",
    "a .jsonl, .csv or .parquet manifest",
    "a .txt list of URLs",
)


@dataclass(frozen=True)
class Source:
    """The inputs of one data set; iterating lists them, each time in the same order, and reads no picture.

    Attributes:
        place: what the user named, resolved.
        parts: what it is made of.
    """

    place: str
    parts: tuple[Part, ...]

    def __iter__(self) -> Iterator[Item]:
        return self._each(hashlib.sha256())

    @property
    def volatile(self) -> bool:
        """Whether the same list may bring other pictures next time: it leads to URLs."""
        return any(part.volatile for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed or written; reads no picture.

        Of shards, of Parquet files that hold their pictures, and of manifests that lead to a bucket or to URLs, the
        files that the user named are looked at and no more.
        """
        return self._survey[0]

    def count(self) -> int | None:
        """How many inputs there are; None where only reading all of the source can tell."""
        return self._survey[1]

    @cached_property
    def _survey(self) -> tuple[str, int | None]:
        """One walk through what is listed cheaply tells both."""
        seen = hashlib.sha256()
        if all(part.listed_cheaply for part in self.parts):
            count = sum(1 for _ in self._each(seen))
            return seen.hexdigest(), count
        seen.update(f"{self.place}\n".encode("utf-8", "replace"))
        for part in self.parts:
            for line in part.stamps():
                seen.update(f"{line}\n".encode("utf-8", "replace"))
        return seen.hexdigest(), None

    def _each(self, seen: hashlib._Hash) -> Iterator[Item]:
        seen.update(f"{self.place}\n".encode("utf-8", "replace"))

        def note(line: str) -> None:
            seen.update(f"{line}\n".encode("utf-8", "replace"))

        empty = True
        try:
            for part in self.parts:
                for item in part.items(note):
                    empty = False
                    yield item
        except OSError as error:
            raise unreadable_source(self.place, error) from error
        except sqlite3.Error as error:
            message, mend = "The rows of the source's manifests cannot be kept meanwhile.", "make room, or set TMPDIR"
            raise DataError(message, value=tempfile.gettempdir(), rule=str(error), mend=mend) from error
        if empty:
            raise DataError("The source holds no pictures.", value=self.place, rule="at least one input", options=KINDS)


def unreadable_source(place: str, error: OSError) -> DataError:
    """The source itself, and not one of its pictures, cannot be read."""
    named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return DataError("The source cannot be read.", value=place, rule=named, options=KINDS)
