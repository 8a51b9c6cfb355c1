"""What is known about a picture besides its pixels: sidecar files and manifest rows, read strictly."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.data.clean import Finding, RefusedError
from training.errors import DataError

PATH_FIELDS = ("file_name", "file", "image", "image_path", "path")
"""Where a manifest's row names its picture; the first one that is not empty counts."""
CAPTION_FIELDS = ("caption", "text", "prompt")
"""Where a row or a sidecar keeps the caption; the first one that is not empty counts."""
MANIFEST_NAMES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
"""Manifests that are recognised in any folder of a folder or a tar."""
MAX_SIDECAR_BYTES = 1_000_000

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a manifest: the picture's path and its fields, or what is wrong with the line."""

    line: int
    path: str = ""
    fields: Mapping[str, Any] | None = None
    finding: Finding | None = None


def parse_object(data: bytes) -> Fields:
    """A JSON object; NaN, arrays and endless nesting are refused.

    Raises:
        ValueError: anything else.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
        canonical(value)  # 1e999 parses to infinity, which no JSON can say
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not {type(value).__name__}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def with_caption(fields: Mapping[str, Any]) -> Fields:
    """The same fields with ``caption`` as one tidy line of text, ``""`` where there is none.

    Raises:
        ValueError: the caption is neither text nor null.
    """
    for name in CAPTION_FIELDS:
        caption = fields.get(name)
        if caption is None:
            continue
        if not isinstance(caption, str):
            raise ValueError(f"{name} must be text, not {type(caption).__name__}")
        tidy = " ".join(caption.encode("utf-8", "replace").decode().split())
        if tidy:
            return {**fields, "caption": tidy}
    return {**fields, "caption": ""}


def sidecar_fields(text: bytes | None, data: bytes | None) -> Fields:
    """The fields of a ``.txt`` and a ``.json`` sidecar; the JSON's own caption wins.

    Raises:
        RefusedError: a sidecar that cannot be read as what it says it is.
    """
    try:
        fields = with_caption({} if data is None else parse_object(data))
        if text is not None and not fields["caption"]:
            fields = with_caption({**fields, "caption": text.decode("utf-8-sig")})
        return fields
    except ValueError as error:
        raise RefusedError(Finding("bad_sidecar", detail=str(error)[:200])) from error


def merged(beside: Fields, row: Mapping[str, Any]) -> Fields:
    """A manifest's row laid over what the sidecars say; a row without a caption keeps theirs."""
    return {**beside, **row, "caption": row["caption"] or beside["caption"]}


def rows(name: str, data: bytes) -> Iterator[Row]:
    """The rows of a JSONL or CSV manifest; a bad line is a row with a finding, never an end.

    Args:
        name: of the manifest; its ending tells the kind.
        data: UTF-8, or UTF-16 with its byte order mark.

    Raises:
        DataError: nothing of it can be understood: damaged UTF-16, or a CSV without a readable header.
    """
    utf8 = _as_utf8(name, data)
    parsed = _csv_rows(name, utf8) if name.lower().endswith(".csv") else _json_rows(utf8)
    for line, fields in parsed:
        try:
            if isinstance(fields, ValueError):
                raise fields
            column = next((key for key in PATH_FIELDS if fields.get(key)), "")
            path = fields.pop(column, None)
            if not isinstance(path, str):
                raise ValueError(f"no picture is named; expected one of {', '.join(PATH_FIELDS)}")
            yield Row(line, path, with_caption(fields))
        except ValueError as error:
            yield Row(line, finding=Finding("bad_row", line, detail=str(error)[:200]))


def _as_utf8(name: str, data: bytes) -> bytes:
    if not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data
    try:
        return data.decode("utf-16").encode()
    except UnicodeError as error:
        raise _unreadable(name, str(error)) from error


def _unreadable(name: str, reason: str) -> DataError:
    return DataError("The manifest cannot be read.", value=name, rule=reason, mend="save it as UTF-8")


def _json_rows(data: bytes) -> Iterator[tuple[int, Fields | ValueError]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                yield number, parse_object(line)
            except ValueError as error:
                yield number, error


def _csv_rows(name: str, data: bytes) -> Iterator[tuple[int, Fields | ValueError]]:
    # a byte that is not UTF-8 becomes a lone surrogate, which real UTF-8 cannot hold: so each row is judged by itself
    text = data.decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [column.strip() for column in reader.fieldnames or ()]
    except csv.Error as error:
        raise _unreadable(name, f"a line of column names first: {error}") from error
    if not _is_text(header):
        raise _unreadable(name, "column names in UTF-8")
    reader.fieldnames = header
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, ValueError(str(error))
            continue
        if row is None:
            return
        if None in row:
            yield reader.line_num, ValueError("more cells than the header has columns")
            continue
        cells = {key: value for key, value in row.items() if value is not None}
        yield reader.line_num, cells if _is_text(cells.values()) else ValueError("not UTF-8; save the file as UTF-8")


def _is_text(cells: Iterable[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


def canonical(fields: object) -> bytes:
    """The one spelling of these fields as JSON: equal fields give equal bytes."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
