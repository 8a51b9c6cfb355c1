"""One input against all rules about it alone, the cheap ones first."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from PIL import Image

from training.data.captions import Fields
from training.data.clean.captions import caption_missing, cleaned
from training.data.clean.config import CleanConfig
from training.data.clean.consent import licence, opted_out, opted_out_hash
from training.data.clean.content import blurred, sharpness, spread, uniform
from training.data.clean.decoding import animated, decoded, opened, too_many_scans
from training.data.clean.match import caption_mismatch
from training.data.clean.measures import Measures
from training.data.clean.phash import GRID_PX, phash, thumbnail
from training.data.clean.reduced import Reduced
from training.data.clean.size import extreme_aspect, too_many_bytes, too_many_pixels, too_small
from training.data.clean.tools import Tools
from training.data.clean.unsafe import unsafe
from training.data.decode import RGB, Facts, stated_by
from training.data.findings import Finding, RefusedError

WHITE: RGB = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the rules say about one input.

    Attributes:
        finding: why it is refused, if it is.
        fields: what is known about it, its caption cleaned.
        facts: what the picture is, or of a damaged or refused one what its header says, if that could be read.
        measures: what was measured on the way.
    """

    finding: Finding | None
    fields: Fields
    facts: Facts | None
    measures: Measures


def judge(data: bytes, fields: Fields, config: CleanConfig, tools: Tools, background: RGB = WHITE) -> Judgement:
    """All rules about one encoded picture and its fields, the cheap ones first; the picture is decoded once.

    Args:
        data: the encoded picture.
        fields: what is known about it.
        config: the rules.
        tools: ``Tools.of(config)``.
        background: the colour behind transparent pixels, over which the picture is judged as it will be trained on.
    """
    fields = cleaned(fields, config.captions)
    found = _by_fields(data, fields, config, tools)
    if found is not None:
        return Judgement(found, fields, None, Measures())
    try:
        header = opened(data, config.size.max_pixels)
    except RefusedError as error:
        return Judgement(error.finding, fields, None, Measures())
    try:
        _before_decoding(data, header, config)
        picture, facts = decoded(data, header, background, config.decoding)
    except RefusedError as error:
        return Judgement(error.finding, fields, stated_by(header), Measures())
    measures = _measures(picture, str(fields.get("caption") or ""), tools)
    return Judgement(_by_measures(measures, config), fields, facts, measures)


def _by_fields(data: bytes, fields: Fields, config: CleanConfig, tools: Tools) -> Finding | None:
    found = (
        too_many_bytes(len(data), config.size)
        or licence(fields, config.consent)
        or opted_out(fields, tools.opt_outs)
        or caption_missing(fields, config.captions)
    )
    if found is None and tools.opt_outs.hashes:
        return opted_out_hash(hashlib.sha256(data).digest(), tools.opt_outs)
    return found


def _before_decoding(data: bytes, header: Image.Image, config: CleanConfig) -> None:
    width, height = header.size
    found = (
        too_many_pixels(width, height, config.size)
        or too_small(width, height, config.size)
        or extreme_aspect(width, height, config.size)
        or too_many_scans(data, header, config.decoding)
        or animated(data, header, config.decoding)
    )
    if found is not None:
        raise RefusedError(found)


def _measures(picture: Image.Image, caption: str, tools: Tools) -> Measures:
    reduced = Reduced.of(picture)
    small = reduced.squeezed(GRID_PX)
    shown = picture.convert("RGB") if tools.unsafe or tools.match else picture
    return Measures(
        phash=phash(small),
        thumbnail=thumbnail(small),
        sharpness=sharpness(reduced),
        spread=spread(small),
        unsafe=tools.unsafe(shown) if tools.unsafe else None,
        features=tools.features(reduced) if tools.features else None,
        caption_match=tools.match(shown, caption) if tools.match and caption else None,
    )


def _by_measures(measures: Measures, config: CleanConfig) -> Finding | None:
    return (
        uniform(measures.spread, config.content)
        or blurred(measures.sharpness, config.content)
        or unsafe(measures.unsafe, config.unsafe)
        or caption_mismatch(measures.caption_match, config.match)
    )
