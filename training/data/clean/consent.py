"""Consent: licences that are accepted, and lists of those who opted out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, field_validator

from training.data.captions import Fields
from training.data.clean.paths import Named
from training.data.findings import Finding
from training.data.licences import UNSTATED, licence_of
from training.data.stated import CREATOR_FIELDS, url_of
from training.errors import ConfigError

_Parsed = TypeVar("_Parsed", str, bytes)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DOMAIN = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_BETWEEN = re.compile(r"[\s_-]+")


class ConsentConfig(BaseModel):
    """Whose pictures may be used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    licences: tuple[str, ...] = ()
    """If not empty, the licences that are accepted, without regard to case, ``-``, ``_`` and spaces; what states none
    is accepted only if ``unstated`` is among them."""
    require_licence: bool = False
    """Drop what states no licence."""
    opt_out_hashes: tuple[Named, ...] = ()
    """Text files with the sha256 of an encoded picture in each line; what follows a ``#`` is a comment."""
    opt_out_domains: tuple[Named, ...] = ()
    """Text files with a domain in each line, which stands for its subdomains too."""
    opt_out_creators: tuple[Named, ...] = ()
    """Text files with a creator in each line, without regard to case and spaces."""

    @field_validator("licences", "opt_out_hashes", "opt_out_domains", "opt_out_creators", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value


@dataclass(frozen=True, slots=True)
class OptOuts:
    """Who opted out, in a form that compares: about 100 bytes of memory for each line.

    Attributes:
        hashes: sha256 of encoded pictures.
        domains: in small ASCII letters.
        creators: folded.
    """

    hashes: frozenset[bytes]
    domains: frozenset[str]
    creators: frozenset[str]

    @classmethod
    def read(cls, config: ConsentConfig) -> OptOuts:
        """The lists that the config names.

        Raises:
            ConfigError: one cannot be read, or a line of it is not what the list holds.
        """
        return cls(
            frozenset(_lines(config.opt_out_hashes, "opt_out_hashes", "64 hexadecimal digits", _digest)),
            frozenset(_lines(config.opt_out_domains, "opt_out_domains", "a domain, such as example.com", domain_name)),
            frozenset(_lines(config.opt_out_creators, "opt_out_creators", "a name", folded)),
        )


def _lines(files: tuple[Path, ...], option: str, rule: str, parse: Callable[[str], _Parsed]) -> Iterator[_Parsed]:
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"A list of {option} cannot be read.", value=str(file), rule=reason, mend="name a UTF-8 text file"
            ) from error
        for number, line in enumerate(lines, start=1):
            text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
            parsed = parse(text) if text else None
            if text and not parsed:
                raise ConfigError(f"A line of {option} is not understood.", value=f"{file}:{number}: {text}", rule=rule)
            if parsed:
                yield parsed


def _digest(text: str) -> bytes:
    return bytes.fromhex(text) if _SHA256.fullmatch(text.lower()) else b""


def domain_name(text: str) -> str:
    """A host in small ASCII letters, without port, path, a leading ``*.`` and a final dot; ``""`` if it is none."""
    try:
        host = urlsplit(text if "//" in text else f"//{text}").hostname or ""
        name = host.removeprefix("*.").rstrip(".").encode("idna").decode().lower()
    except ValueError:  # UnicodeError is one, too
        return ""
    return name if _DOMAIN.fullmatch(name) else ""


def folded(text: str) -> str:
    """A name for comparing: compatible letters, case and spaces do not tell names apart."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def licence(fields: Fields, config: ConsentConfig) -> Finding | None:
    """A licence that is not accepted, or none where one is required."""
    stated = licence_of(fields)
    accepted = {_comparable(name) for name in config.licences}
    if not stated:
        if not config.require_licence and (not accepted or UNSTATED in accepted):
            return None
        return Finding("no_licence", detail="no licence is stated")
    if not accepted or _comparable(stated) in accepted:
        return None
    return Finding("licence_not_accepted", detail=f"{stated}; accepted are {', '.join(config.licences)}"[:200])


def _comparable(name: str) -> str:
    return _BETWEEN.sub(" ", folded(name)).strip()


def opted_out(fields: Fields, lists: OptOuts) -> Finding | None:
    """A creator or a domain that opted out, wherever in the fields it is named."""
    for name in _creators(fields) if lists.creators else ():
        if folded(name) in lists.creators:
            return Finding("opt_out_creator", detail=f"{' '.join(name.split())} opted out"[:200])
    for place in _places(fields) if lists.domains else ():
        labels = domain_name(place).split(".")
        for start in range(len(labels)):
            listed = ".".join(labels[start:])
            if listed in lists.domains:
                return Finding("opt_out_domain", detail=f"{listed} opted out"[:200])
    return None


def opted_out_hash(digest: bytes, lists: OptOuts) -> Finding | None:
    """A file whose sha256 opted out."""
    return Finding("opt_out_hash", detail="its sha256 opted out") if digest in lists.hashes else None


def _creators(fields: Fields) -> Iterator[str]:
    for name in CREATOR_FIELDS:
        value = fields.get(name)
        yield from (str(part) for part in (value if isinstance(value, list) else [value]) if part)


def _places(fields: Fields) -> Iterator[str]:
    """The domain that is stated, and the one of the URL: who states the former need not tell the truth."""
    yield from (place for place in (str(fields.get("domain") or ""), url_of(fields)) if place)
