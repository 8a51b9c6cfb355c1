"""What is stated beside a picture about where it comes from, printable and cut."""

from __future__ import annotations

from urllib.parse import urlsplit

from training.data.captions import Fields
from training.data.entries import printable
from training.data.licences import licence_of
from training.data.redaction import without_secrets

__all__ = ["CREATOR_FIELDS", "creator_of", "domain_of", "licence_of", "url_of"]

CREATOR_FIELDS = ("creator", "author", "artist")
"""Where a picture's maker is named; the first one that is not empty counts."""
_MAX_LETTERS = 200
_MAX_URL_LETTERS = 2000


def creator_of(fields: Fields) -> str:
    """Who made the picture; ``""`` where nobody is named."""
    return _text(fields, CREATOR_FIELDS, _MAX_LETTERS)


def url_of(fields: Fields) -> str:
    """Where the picture lay, without what signs it; ``""`` where it is not said."""
    return without_secrets(_text(fields, ("url",), _MAX_URL_LETTERS))


def domain_of(fields: Fields) -> str:
    """The host that the picture came from, from its URL where it is not stated; small letters, no port."""
    stated = _text(fields, ("domain",), _MAX_LETTERS)
    try:
        return (stated or urlsplit(url_of(fields)).hostname or "").lower()
    except ValueError:  # not a URL
        return ""


def _text(fields: Fields, names: tuple[str, ...], letters: int) -> str:
    found = next((fields[name] for name in names if fields.get(name)), "")
    return printable(str(found)[:letters])
