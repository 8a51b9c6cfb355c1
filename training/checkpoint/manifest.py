"""A checkpoint's manifest: what it holds, and the checksums that every one of its bytes is held against."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import CheckpointError

NAME = "checkpoint.json"
_CHECK = re.compile(rb'"check": "([0-9a-f]{64})"')
_BLANK = b"0" * 64


class FileFacts(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of its bytes."""
    bytes: int = Field(ge=0)
    """How many."""


class Manifest(BaseModel):
    """Describes a whole checkpoint; written after all else is on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str = Field(default=_BLANK.decode(), pattern=r"^[0-9a-f]{64}$")
    """sha256 of the manifest's own bytes, with zeros in its place."""
    version: Literal[2] = 2
    """Of this format."""
    step: int = Field(ge=0)
    """Optimizer steps done."""
    position: int = Field(ge=0)
    """Samples consumed of the global stream."""
    written_s: float
    """When it was written, seconds since 1970."""
    files: dict[str, FileFacts]
    """By name, relative to the checkpoint's folder."""
    scalars: dict[str, float]
    """Of the engine."""
    metrics: dict[str, float]
    """What was measured at this very step."""
    about: dict[str, Any]
    """What the run recorded: recipe, code version, data hash, world, account of use, guards' state."""

    def sealed(self) -> bytes:
        """The manifest's bytes."""
        data = json.dumps(self.model_copy(update={"check": _BLANK.decode()}).model_dump(), indent=1).encode()
        return _with_check(data, hashlib.sha256(data).hexdigest().encode())


def parse(data: bytes, place: str) -> Manifest:
    """Read what ``Manifest.sealed`` gave.

    Raises:
        CheckpointError: any byte is another one; the message names ``place``.
    """
    found = _CHECK.search(data)
    blank = _with_check(data, _BLANK) if found else b""
    if found is None or hashlib.sha256(blank).hexdigest().encode() != found[1]:
        raise CheckpointError(
            "The checkpoint's manifest cannot be read: it is altered or cut off, or of another version.",
            value=place,
            rule="JSON whose field `check` is its sha256",
        )
    try:
        return Manifest.model_validate(json.loads(data))
    except (ValueError, ValidationError) as error:
        raise CheckpointError(
            "The checkpoint's manifest cannot be read.", value=place, rule=str(error).splitlines()[0]
        ) from None


def _with_check(data: bytes, check: bytes) -> bytes:
    return _CHECK.sub(b'"check": "%s"' % check, data, count=1)


def differing(files: Mapping[str, FileFacts], there: Mapping[str, int]) -> list[str]:
    """The files that are missing or of another size."""
    return [name for name, facts in files.items() if there.get(name) != facts.bytes]
