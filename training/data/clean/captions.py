"""Captions: markup, control characters and links go, what is left must have a sensible length."""

from __future__ import annotations

import html
import re
import unicodedata

from pydantic import BaseModel, ConfigDict, Field

from training.data.captions import Fields
from training.data.findings import Finding

ORIGINAL = "caption_original"

_UNESCAPED = 3
"""How often text is found escaped over and over."""
_HIDDEN = re.compile(r"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
_LINK = re.compile(r"(?:https?://|www\.)\S+|(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+", re.IGNORECASE)
_JOINERS = "\u200c\u200d"
_MAX_LETTERS = 20_000
"""Letters of a caption that are looked at: markup that never ends costs their square."""


class CaptionConfig(BaseModel):
    """How captions are cleaned, and which a picture may have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clean: bool = True
    """Undo HTML, drop control and invisible characters, compose to NFC, make one line of it, cut it to length."""
    drop_links: bool = False
    """Take URLs and e-mail addresses out of captions, too."""
    keep_original: bool = True
    """Where cleaning changed a caption, keep the one that came in the field ``caption_original``; turn it off where
    what is taken out must not be kept."""
    max_letters: int = Field(default=2_000, ge=1, le=_MAX_LETTERS)
    """A longer caption is cut after the last word that fits."""
    min_letters: int = Field(default=0, ge=0)
    """A picture whose caption is shorter is dropped; without any caption it is a matter of ``require``."""
    require: bool = False
    """Drop pictures without a caption."""


def cleaned(fields: Fields, config: CaptionConfig) -> Fields:
    """The fields with their caption cleaned; the same object where nothing changed."""
    caption = str(fields.get("caption") or "")
    clean = clean_caption(caption, config) if config.clean else caption
    if clean == fields.get("caption", ""):
        return fields
    return {**fields, "caption": clean, **({ORIGINAL: caption} if config.keep_original and clean != caption else {})}


def clean_caption(text: str, config: CaptionConfig) -> str:
    """A caption as one line of visible text in NFC."""
    text = text[:_MAX_LETTERS]
    for _ in range(_UNESCAPED):
        plain = html.unescape(text)
        if plain == text:
            break
        text = plain
    text = _TAG.sub(" ", _HIDDEN.sub(" ", text))
    if config.drop_links:
        text = _LINK.sub(" ", text)
    text = " ".join(_visible(unicodedata.normalize("NFC", text)).split())
    if len(text) <= config.max_letters:
        return text
    cut = text[: config.max_letters + 1]
    return (cut.rpartition(" ")[0] or cut[:-1]).rstrip()


def _visible(text: str) -> str:
    """Without characters that nobody sees; joiners stay inside words and emoji, where they change what is seen."""
    if text.isascii() and text.isprintable():
        return text
    seen = []
    for at, letter in enumerate(text):
        kind = unicodedata.category(letter)
        if kind == "Cc":
            seen.append(" ")
        elif kind[0] != "C" or kind == "Cn" or (letter in _JOINERS and _joins(text, at)):
            seen.append(letter)
    return "".join(seen)


def _joins(text: str, at: int) -> bool:
    around = text[at - 1 : at] + text[at + 1 : at + 2]
    return len(around) == 2 and all(
        not letter.isascii() and unicodedata.category(letter)[0] != "C" for letter in around
    )


def caption_missing(fields: Fields, config: CaptionConfig) -> Finding | None:
    """No caption where one is required, or one that is too short."""
    letters = len(str(fields.get("caption") or ""))
    if letters == 0:
        return Finding("no_caption", 0, 1, "no caption") if config.require else None
    if letters >= config.min_letters:
        return None
    return Finding("caption_too_short", letters, config.min_letters, f"{letters} letters < {config.min_letters}")
