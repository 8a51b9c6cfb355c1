"""What is known about a picture besides its pixels: read strictly, from sidecars and rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from training.data.findings import Finding, RefusedError

CAPTION_FIELDS = ("caption", "text", "prompt")
"""Where a row or a sidecar keeps the caption; the first one that is not empty counts."""
MAX_SIDECAR_BYTES = 1_000_000

Fields = dict[str, Any]


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


def sidecar_fields(text: bytes | None = None, data: bytes | None = None, label: bytes | None = None) -> Fields:
    """The fields of a ``.txt``, a ``.json`` and a ``.cls`` sidecar; what the JSON says itself wins.

    Raises:
        RefusedError: a sidecar that cannot be read as what it says it is.
    """
    try:
        fields = with_caption({} if data is None else parse_object(data))
        if text is not None and not fields["caption"]:
            fields = with_caption({**fields, "caption": text.decode("utf-8-sig")})
        if label is not None and fields.get("label") is None:
            fields = {**fields, "label": label.decode("utf-8-sig").strip()}
        return fields
    except ValueError as error:
        raise RefusedError(Finding("bad_sidecar", detail=str(error)[:200])) from error


def merged(beside: Fields, row: Mapping[str, Any]) -> Fields:
    """A manifest's row laid over what the sidecars say; a row without a caption keeps theirs."""
    return {**beside, **row, "caption": row["caption"] or beside["caption"]}


def canonical(fields: object) -> bytes:
    """The one spelling of these fields as JSON: equal fields give equal bytes."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
