"""The rows of a manifest, one after the other: JSONL, CSV, Parquet, or a plain list of URLs."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from training.data.captions import Fields, parse_object, with_caption
from training.data.findings import Finding
from training.errors import DataError

PATH_FIELDS = ("file_name", "file", "image", "image_path", "path")
"""Where a row names its picture; the first one that is not empty counts. A URL may stand there, too."""
URL_FIELD = "url"
"""Where a row without a path has its picture's URL, if the user names no other field."""
ENDINGS = (".jsonl", ".csv", ".parquet")
"""Kinds of manifests."""
MANIFEST_NAMES = tuple(f"{stem}{ending}" for ending in ENDINGS for stem in ("captions", "metadata"))
"""Manifests that are recognised in any folder of a folder or a tar; an earlier one's rows come before a later one's."""

_MAX_LINE_LETTERS = 16_000_000
_WITH_SECRET = re.compile(r"[a-z]+://[^/?#]*@", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Cell:
    """Where in a Parquet file a picture's bytes are.

    Attributes:
        group: the row group.
        row: within the group.
        column: the column, ``image.bytes`` for instance.
    """

    group: int
    row: int
    column: str


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a manifest, or what is wrong with it; ``path``, ``url`` or ``cell`` says where the picture is.

    Attributes:
        line: counted from 1, with a CSV's header; a Parquet file's rows count from 1, too.
        path: relative to the manifest's folder.
        url: http or https.
        cell: of a Parquet file that holds the pictures themselves.
        fields: what else the row says, ``caption`` always.
        finding: why the line is no row.
    """

    line: int
    path: str = ""
    url: str = ""
    cell: Cell | None = None
    fields: Mapping[str, Any] | None = None
    finding: Finding | None = None


def rows(name: str, file: BinaryIO, url_field: str = URL_FIELD) -> Iterator[Row]:
    """The rows of a manifest; a bad line is a row with a finding, never an end.

    Args:
        name: of the manifest; its ending tells the kind.
        file: from its start, seekable; text is UTF-8, or UTF-16 with its byte order mark.
        url_field: where a row without a path has its picture's URL.

    Raises:
        DataError: nothing of it can be understood: damaged UTF-16, a CSV without a readable header, no Parquet.
    """
    ending = name.lower().rpartition(".")[2]
    if ending == "parquet":
        from training.data.parquet_rows import parquet_rows

        for line, fields, cell in parquet_rows(name, file):
            yield _row(line, fields, url_field, cell)
        return
    kinds = {"csv": _csv_rows, "txt": _url_rows}
    for line, fields in kinds.get(ending, _json_rows)(name, _Lines(name, file)):
        yield _row(line, fields, url_field, None)


def unreadable(name: str, reason: str, mend: str = "save it as UTF-8") -> DataError:
    """A manifest of which nothing can be understood."""
    return DataError("The manifest cannot be read.", value=name, rule=reason, mend=mend)


def _row(line: int, fields: Fields | ValueError, url_field: str, cell: Cell | None) -> Row:
    try:
        if isinstance(fields, ValueError):
            raise fields
        if cell is not None:
            return Row(line, cell=cell, fields=with_caption(fields))
        column = next((key for key in PATH_FIELDS if fields.get(key)), "")
        path = fields.pop(column, None) or ""
        url = path if _is_url(path) else "" if path else fields.get(url_field) or ""
        if not isinstance(path, str) or not isinstance(url, str) or not path + url:
            raise ValueError(f"no picture is named; expected one of {', '.join(PATH_FIELDS)}, or {url_field}")
        if _WITH_SECRET.match(url):  # its name would carry the password into the ledger
            return Row(
                line, finding=Finding("bad_url", line, detail="a URL with a name or password in it is not asked")
            )
        if not url:
            return Row(line, path, fields=with_caption(fields))
        return Row(line, url=url, fields=with_caption({**fields, "url": url}))
    except ValueError as error:
        return Row(line, finding=Finding("bad_row", line, detail=str(error)[:200]))


def _is_url(path: object) -> bool:
    return isinstance(path, str) and path[:8].lower().startswith(("http://", "https://"))


class _Lines:
    """The lines of a text of any length, each cut at a limit: a file without line ends must not fill the memory."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name = name
        start = file.read(2)
        file.seek(0)
        wide = start in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}
        # a byte that is not UTF-8 becomes a lone surrogate, which real UTF-8 cannot hold: each row is judged by itself
        errors = "strict" if wide else "surrogateescape"
        encoding = "utf-16" if wide else "utf-8-sig"
        self._text = io.TextIOWrapper(file, encoding, errors, newline="")
        self.cut = False
        """Whether a line since this was last set to False was longer than the limit."""

    def __iter__(self) -> Iterator[str]:
        while line := self._next():
            cut = len(line) >= _MAX_LINE_LETTERS and not line.endswith(("\n", "\r"))
            self.cut |= cut
            yield line
            if cut:
                while (rest := self._next()) and not rest.endswith(("\n", "\r")):
                    pass

    def _next(self) -> str:
        try:
            return self._text.readline(_MAX_LINE_LETTERS)
        except UnicodeError as error:
            raise unreadable(self._name, str(error)) from error


def _json_rows(_name: str, lines: _Lines) -> Iterator[tuple[int, Fields | ValueError]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, parse_object(line.encode("utf-8", "surrogateescape"))
            except ValueError as error:
                yield number, error


def _url_rows(_name: str, lines: _Lines) -> Iterator[tuple[int, Fields | ValueError]]:
    for number, line in enumerate(lines, start=1):
        url = line.strip()
        if url:
            yield number, {"file": url} if _is_url(url) and _is_text([url]) else ValueError("not an http or https URL")


def _csv_rows(name: str, lines: _Lines) -> Iterator[tuple[int, Fields | ValueError]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        header = [column.strip() for column in reader.fieldnames or ()]
    except csv.Error as error:
        raise unreadable(name, f"a line of column names first: {error}") from error
    if not _is_text(header):
        raise unreadable(name, "column names in UTF-8")
    reader.fieldnames = header
    while True:
        lines.cut = False
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, ValueError(str(error))
            continue
        if row is None:
            return
        if None in row or lines.cut:
            why = f"longer than {_MAX_LINE_LETTERS} letters" if lines.cut else "more cells than the header has columns"
            yield reader.line_num, ValueError(why)
            continue
        cells = {key: value for key, value in row.items() if value is not None}
        yield reader.line_num, cells if _is_text(cells.values()) else ValueError("not UTF-8; save the file as UTF-8")


def _is_text(cells: Iterable[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True
