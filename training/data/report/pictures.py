"""The pictures of a report, small: kept ones from the shards, dropped ones from the source if it is still there."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from PIL import Image

from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.decode import background_rgb, decode, open_header
from training.data.findings import RefusedError, describe
from training.data.origin import ORIGIN
from training.data.report.numbers import Numbers
from training.data.report.rows import Found, choose, rows_at
from training.data.sources import Item, open_source
from training.data.sources.item import Linked
from training.data.storage import Folder
from training.errors import DarkroomError, DataError, StorageError

SIDE_PX = 160
"""The longer side of a picture on the page."""
KEPT = 72
"""Kept pictures shown."""
PER_RULE = 18
"""Dropped ones shown of each rule."""
WITHHELD = {
    "forgotten": "forgotten",
    "opt_out_hash": "opted out",
    "opt_out_domain": "opted out",
    "opt_out_creator": "opted out",
    "unsafe": "unsafe",
}
"""Rules whose pictures are not shown, nor are copies of such pictures: somebody asked for it, or would have to see."""
_MAX_PIXELS = 64_000_000
"""What has more is not decoded to be shown."""
_MAX_LETTERS = 300

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Shown:
    """One input on the page.

    Attributes:
        number: in the ledger.
        name: within the source.
        caption: cut.
        note: why it was dropped, in words.
        size: width x height, where known.
        webp: the small picture; None if there is none to show.
        why: why there is none.
    """

    number: int
    name: str
    caption: str
    note: str
    size: str
    webp: bytes | None
    why: str = ""


@dataclass(frozen=True)
class Pair:
    """A dropped copy, and the input that is kept instead."""

    rule: str
    kept: Shown
    copy: Shown


@dataclass(frozen=True)
class Pictures:
    """What a page shows.

    Attributes:
        kept: spread evenly over the data set.
        dropped: by rule, spread evenly over what it dropped; duplicates are in ``pairs`` instead.
        pairs: duplicates.
        source: why the source's pictures are not shown; ``""`` where they are.
    """

    kept: tuple[Shown, ...] = ()
    dropped: dict[str, tuple[Shown, ...]] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    source: str = ""


def pictures(dataset: Dataset, folder: Folder, counted: Numbers, progress: Progress | None = None) -> Pictures:
    """Choose the inputs to show, and make their small pictures. Nothing that cannot be shown is an error.

    What opted out, was forgotten or is unsafe is named, and not shown.

    Args:
        dataset: what the report is on.
        folder: where it lies.
        counted: its numbers.
        progress: told (pictures done, pictures in all).
    """
    counts: dict[str | None, int] = {None: counted.kept, **{dropped.rule: dropped.count for dropped in counted.dropped}}
    chosen = choose(folder, counts, {rule: KEPT if rule is None else PER_RULE for rule in counts})
    found = rows_at(folder, (number for numbers in chosen.values() for number in numbers))
    twins = rows_at(folder, {one.row.of for one in found.values() if one.row.of is not None} - found.keys())
    everything = {**found, **twins}
    shown = {
        number: _shown(one, None, why) for number, one in everything.items() if (why := _withheld(one, everything))
    }
    for number, one in everything.items():
        if one.index is not None and number not in shown:
            shown[number] = _from_shard(dataset, one)
        if progress:
            progress(len(shown), len(everything))
    missing, why = _from_source(dataset, folder, [one for number, one in everything.items() if number not in shown])
    shown.update(missing)
    pairs, dropped = [], {}
    for rule, numbers in chosen.items():
        if rule is None:
            continue
        copies = [number for number in numbers if found[number].row.of in shown]
        pairs += [Pair(rule, shown[found[number].row.of or 0], shown[number]) for number in copies]
        others = tuple(shown[number] for number in numbers if number not in copies)
        if others:
            dropped[rule] = others
    return Pictures(tuple(shown[number] for number in chosen[None]), dropped, tuple(pairs), why)


def _withheld(one: Found, known: Mapping[int, Found]) -> str:
    """Why a picture must not be shown; ``""`` where it may be."""
    twin = known.get(one.row.of) if one.row.of is not None else None
    return WITHHELD.get(one.row.rule or "", "") or (WITHHELD.get(twin.row.rule or "", "") if twin else "")


def _shown(one: Found, webp: bytes | None, why: str = "") -> Shown:
    row = one.row
    size = f"{row.width}x{row.height}" if row.width and row.height else ""
    note = row.detail or (f"{row.value:g}" if row.value is not None else "")
    return Shown(row.number, row.source[:_MAX_LETTERS], row.caption[:_MAX_LETTERS], note, size, webp, why)


def small(data: bytes, background: tuple[int, int, int]) -> bytes:
    """A picture as a small WebP.

    Raises:
        DataError: too many pixels.
        Exception: whatever Pillow raises for damaged bytes.
    """
    width, height = open_header(data).size
    if width * height > _MAX_PIXELS:
        raise DataError(f"{width}x{height} pixels are not decoded")
    picture = decode(data, background)
    picture.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


def _from_shard(dataset: Dataset, one: Found) -> Shown:
    background = background_rgb(dataset.manifest.config.background)
    if one.row.split is None or one.index is None:
        return _shown(one, None, "not in a shard")
    split = dataset.split(one.row.split)
    try:
        if split.key(one.index) != one.row.key:
            return _shown(one, None, "its shard holds another sample")
        return _shown(one, small(split.encoded(one.index), background))
    except (DarkroomError, MemoryError, StorageError) as error:
        return _shown(one, None, error.rule or error.message if isinstance(error, DarkroomError) else "no memory")
    except Exception as error:  # noqa: BLE001 - a damaged sample is shown as one; `data show --verify` names the file
        return _shown(one, None, describe(error))


def _from_source(dataset: Dataset, folder: Folder, lost: list[Found]) -> tuple[dict[int, Shown], str]:
    """Pictures that are in no shard, read again from where they were; and why that cannot be, if it cannot."""
    wanted = {one.row.number: one for one in lost}
    shown = {number: _shown(one, None, "not read again") for number, one in wanted.items()}
    if not lost:
        return shown, ""
    try:
        source = open_source(json.loads(folder.read(ORIGIN))["source"], dataset.manifest.config.source)
    except (OSError, ValueError, TypeError, KeyError):
        return shown, "the data set does not say where its source was"
    except DarkroomError as error:
        return shown, f"its source is not there any more ({error.message.rstrip('.')})"
    if source.volatile:
        return shown, "its source is a list of URLs, which are not asked again"
    last = max(wanted)
    for number, item in enumerate(source):
        if number in wanted:
            shown[number] = _again(item, wanted[number], dataset.manifest.config)
        if number == last:
            break
    return shown, ""


def _again(item: Item, one: Found, config: BuildConfig) -> Shown:
    """A dropped picture as it is now; only the very bytes that were judged are shown."""
    if isinstance(item.image, Linked):
        return _shown(one, None, "a URL is not asked again")
    try:
        data, _ = item.fetch(config.clean)
        if item.name != one.row.source or hashlib.sha256(data).hexdigest() != one.row.sha256:
            return _shown(one, None, "changed since" if one.row.sha256 else "never read")
        return _shown(one, small(data, background_rgb(config.background)))
    except RefusedError:
        return _shown(one, None, "no picture")
    except DarkroomError as error:
        return _shown(one, None, error.message)
    except Exception as error:  # noqa: BLE001 - decoders raise nearly anything for hostile bytes
        return _shown(one, None, "no memory" if isinstance(error, MemoryError) else "cannot be decoded")
