"""The second stage of a build: a block of inputs is fetched and judged, and all that was found is one Parquet part."""

from __future__ import annotations

import functools
import hashlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from PIL import Image

from training.data.ahead import ahead
from training.data.blocks import Block
from training.data.captions import Fields, canonical
from training.data.clean import CleanConfig, Judgement, Tools, judge
from training.data.config import BuildConfig
from training.data.decode import Facts, background_rgb
from training.data.findings import Finding, RefusedError, describe
from training.data.ledger import LedgerRow
from training.data.local_store import written
from training.data.normalise import normalise
from training.data.origin import identity
from training.data.parts import pictures_name, write_part
from training.data.redaction import without_secrets
from training.data.sources import Item
from training.data.sources.item import Embedded, Linked
from training.data.stated import creator_of, domain_of, licence_of, url_of
from training.data.storage import Folder, is_remote

_FETCHERS = 16
"""Pictures of one block that are fetched at once from storage or hosts that take their time to answer."""

Fetched = Callable[[], tuple[bytes, Fields]]


@dataclass(frozen=True)
class Judged:
    """What a block came to."""

    inputs: int
    dropped: Counter[str]


@dataclass(frozen=True)
class Judge:
    """Judges blocks; it pickles.

    Attributes:
        parts: the folder of the parts.
        config: what is asked for.
        staged: keep the bytes of what passes beside the part: they may not come a second time, or were made here.
            Those of a block with URLs are kept in any case.
        refused: inputs that are not to be touched, by number, with the reason.
    """

    parts: Folder
    config: BuildConfig
    staged: bool
    refused: tuple[tuple[int, Finding], ...] = ()

    def __call__(self, block: Block) -> Judged:
        """Judge one block and write its part.

        Raises:
            StorageError: the work folder cannot be written.
        """
        rows, refused = [], dict(self.refused)
        with self._pictures(block) as pictures, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own pixel limit is lower
            warnings.filterwarnings("ignore", module="PIL")  # damaged metadata; what matters is a finding
            for number, (item, fetch) in enumerate(self._fetching(block), start=block.first):
                rows.append(self._row(number, item, fetch, refused.get(number), pictures))
        write_part(self.parts, block.name, rows)
        return Judged(len(rows), Counter(row["rule"] for row in rows if row["rule"]))

    @contextmanager
    def _pictures(self, block: Block) -> Iterator[IO[bytes] | None]:
        name = pictures_name(block.name)
        if not self.staged and not any(isinstance(item.image, Linked) for item in block.items):
            yield None
        elif self.parts.local is not None:
            with written(self.parts.local / name) as file:
                yield file
        else:
            with tempfile.NamedTemporaryFile() as aside:
                yield aside.file
                aside.flush()
                self.parts.upload(Path(aside.name), name)

    def _fetching(self, block: Block) -> Iterator[tuple[Item, Fetched]]:
        """The items in order, each with its fetching: begun already where the source is distant."""
        if not self.refused and any(_is_distant(item) for item in block.items):  # what is refused must not be begun
            fetch: Callable[[Item], tuple[bytes, Fields]] = lambda item: item.fetch(self.config.clean)  # noqa: E731
            yield from ((item, begun.result) for item, begun in ahead(fetch, block.items, _FETCHERS))
        else:
            yield from ((item, functools.partial(item.fetch, self.config.clean)) for item in block.items)

    def _row(
        self, number: int, item: Item, fetch: Fetched, refused: Finding | None, pictures: IO[bytes] | None
    ) -> dict[str, Any]:
        try:
            if refused is not None:
                raise RefusedError(refused)
            data, fields = fetch()
        except RefusedError as error:
            row = _with_finding(_unread(number, item), error.finding)
            return {**row.as_dict(), "identity": identity(item.name, "", None)}
        digest = hashlib.sha256(data)
        background = background_rgb(self.config.background)
        judgement = judge(data, fields, self.config.clean, tools_of(self.config.clean), background)
        row = _ledger_row(number, item, data, digest.hexdigest(), judgement)
        found: dict[str, Any] = {"digest": digest.digest(), "identity": identity(item.name, row.sha256, fields)}
        if judgement.finding is None and judgement.facts is not None:
            try:
                stored, facts = normalise(data, judgement.facts, self.config.store, background)
            except Exception as error:  # noqa: BLE001 - encoders raise nearly anything; the ledger names it
                row = _with_finding(row, Finding("corrupt", detail=describe(error)))
            else:
                found |= _stored(stored, facts, digest.digest() if stored is data else None, pictures)
                found |= {"thumbnail": judgement.measures.thumbnail, "features": judgement.measures.features}
        return {**row.as_dict(), **found}


@functools.lru_cache(maxsize=1)
def tools_of(config: CleanConfig) -> Tools:
    """The models that the rules need, opened once per process."""
    return Tools.of(config)


def _is_distant(item: Item) -> bool:
    """Whether what holds its picture takes its time to answer."""
    if isinstance(item.image, Linked):
        return True
    file = item.image.file if isinstance(item.image, Embedded) else item.image
    return file is not None and is_remote(file.root)


def _stored(data: bytes, facts: Facts, digest: bytes | None, pictures: IO[bytes] | None) -> dict[str, Any]:
    found = {
        "stored_digest": digest or hashlib.sha256(data).digest(),
        "stored_bytes": len(data),
        "stored_width": facts.width,
        "stored_height": facts.height,
        "stored_kind": facts.kind,
        "stored_direct": facts.direct,
        "stored_offset": None,
    }
    if pictures is not None:
        found["stored_offset"] = pictures.tell()
        pictures.write(data)
    return found


def _ledger_row(number: int, item: Item, data: bytes, sha256: str, judgement: Judgement) -> LedgerRow:
    fields, facts, measures = judgement.fields, judgement.facts, judgement.measures
    row = LedgerRow(
        number=number,
        source=item.name,
        kept=False,
        sha256=sha256,
        phash=measures.phash,
        bytes=len(data),
        width=facts.width if facts else None,
        height=facts.height if facts else None,
        kind=facts.kind if facts else "",
        caption=without_secrets(str(fields.get("caption") or "")),
        licence=licence_of(fields),
        creator=creator_of(fields),
        domain=domain_of(fields),
        url=url_of(fields),
        sharpness=measures.sharpness,
        spread=measures.spread,
        unsafe=measures.unsafe,
        caption_match=measures.caption_match,
        detail=facts.note if facts else "",
        fields=without_secrets(canonical(fields).decode()),
    )
    return row if judgement.finding is None else _with_finding(row, judgement.finding)


def _unread(number: int, item: Item) -> LedgerRow:
    """The row of an input that was not had, with what a manifest says of it: where it lay, whose it is."""
    fields = dict(item.fields or {})
    return LedgerRow(
        number=number,
        source=item.name,
        kept=False,
        caption=without_secrets(str(fields.get("caption") or "")),
        licence=licence_of(fields),
        creator=creator_of(fields),
        domain=domain_of(fields),
        url=url_of(fields),
        fields=without_secrets(canonical(fields).decode()),
    )


def _with_finding(row: LedgerRow, finding: Finding) -> LedgerRow:
    return replace(
        row,
        rule=finding.rule,
        value=finding.value,
        threshold=finding.threshold,
        detail=finding.detail,
        of=finding.of,
    )


@dataclass(frozen=True)
class Probe:
    """Judges blocks and keeps nothing: shows which input kills the process that touches it."""

    judge: Judge

    def __call__(self, block: Block) -> None:
        """Judge one block."""
        for number, item in enumerate(block.items, start=block.first):
            self.judge._row(number, item, functools.partial(item.fetch, self.judge.config.clean), None, None)
