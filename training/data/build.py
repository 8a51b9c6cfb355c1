"""Build a data set: fetch and judge every input, write shards, index, ledger and manifest, then make them visible."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from training.data.captions import Fields, canonical
from training.data.clean import CleanConfig, Finding, RefusedError, judge
from training.data.config import BuildConfig
from training.data.entries import printable
from training.data.index import IndexWriter
from training.data.ledger import LEDGER, LedgerRow
from training.data.licences import Licences, licence_of
from training.data.manifest import MANIFEST, SPLITS, Manifest, SplitFacts, SplitName, content_hash, file_facts
from training.data.output import contents, finished, note_origin, refuse_unsafe_output, replace_with, sweep
from training.data.shards import ShardWriter
from training.data.sources import Item, Source, identity, open_source
from training.errors import DataError

__all__ = ["BuildConfig", "build"]

_MAX_WORKERS = 8
"""Each decodes one picture of up to ``max_pixels``: this bounds memory."""

_NAMED = 5
"""Dropped inputs that an error names."""

Progress = Callable[[int, int], None]


def _silent(_done: int, _total: int) -> None:
    """No progress is shown."""


def build(
    source: Path, out: Path, config: BuildConfig, progress: Progress | None = None, *, force: bool = False
) -> Manifest:
    """Turn a folder, a tar or a JSONL/CSV manifest into a data set.

    Bad inputs are dropped and named in the ledger. A picture that a manifest names in five rows, as COCO has five
    captions for each, is five samples, all in one split. The same call again finds the finished result. The data set
    becomes visible by one rename when it is complete; whatever ends a build earlier leaves ``out`` as it was.

    Args:
        source: what to read; only files inside it (for a manifest: inside its folder) are read.
        out: the data set's folder.
        config: what a picture must be, how many are held out.
        progress: told (inputs done, inputs in all); comparing with a finished result may read all inputs, too.
        force: replace a data set that was built from something else, or that is damaged.

    Raises:
        DataError: the source is missing or nothing of it can be kept, ``out`` holds something else or changes
            meanwhile, or the disk fails.
    """
    refuse_unsafe_output(source, out)
    inputs = open_source(source)
    progress = progress or _silent
    try:
        sweep(out)
        before = contents(out)
        present = finished(inputs, out, config, progress, force=force)
        if present is not None:
            return present
        with replace_with(out, before) as partial:
            manifest = _write(inputs, partial, config, progress)
            note_origin(partial, inputs)
    except OSError as error:
        raise DataError(
            "The data set could not be written.",
            value=str(error.filename or out),
            rule=error.strerror or str(error),
            mend="make room or choose another folder, then run the same command again",
        ) from error
    return manifest


@dataclass(frozen=True)
class _Judged:
    """An input after it was read: ``sha256`` is empty and ``fields`` None where it could not be."""

    item: Item
    finding: Finding | None
    ending: str = ""
    image: bytes = b""
    sha256: bytes = b""
    fields: Fields | None = None


def _judge(item: Item, config: CleanConfig) -> _Judged:
    try:
        image, fields = item.fetch(config)
    except RefusedError as error:
        return _Judged(item, error.finding)
    finding, ending = judge(image, config)
    return _Judged(item, finding, ending, image, hashlib.sha256(image).digest(), fields)


def _in_order(items: Iterable[Item], config: CleanConfig) -> Iterator[_Judged]:
    """Judge on all cores (decoders release the interpreter), results in the order of the inputs, few in flight."""
    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    pending: deque[Future[_Judged]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="judge") as pool:
        try:
            for item in items:
                pending.append(pool.submit(_judge, item, config))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def split_of(digest: bytes, held_out: float) -> SplitName:
    """The split of a picture, by its bytes alone: a copy never lands on the other side.

    Args:
        digest: the sha256 of the encoded picture.
        held_out: the share to hold out.
    """
    return "held_out" if int.from_bytes(digest[8:16], "big") < held_out * 2**64 else "train"


class _SplitWriter:
    """The shards and the index of one split."""

    def __init__(self, folder: Path, name: SplitName, config: BuildConfig, stack: ExitStack) -> None:
        self.index_name = f"{name}.index.npy"
        self.image_bytes = 0
        self.shards = stack.enter_context(ShardWriter(folder, name, config.shard_mb * 1_000_000))
        self.index = stack.enter_context(IndexWriter(folder / self.index_name))

    def add(self, number: int, row: LedgerRow, judged: _Judged) -> LedgerRow:
        """Write the data set's sample ``number``; returns its ledger row with the place filled in."""
        key = f"{number:08d}-{_slug(judged.item.name)}"
        fields = canonical(judged.fields)
        placed = self.shards.add(key, judged.ending, judged.image, fields)
        sizes = len(judged.image), len(fields)
        prefix = int.from_bytes(judged.sha256[:8], "big")
        self.index.append((placed.shard, *sizes, placed.image_offset, placed.json_offset, prefix))
        self.image_bytes += len(judged.image)
        return replace(row, kept=True, key=key, shard=placed.name, offset=placed.image_offset)

    def facts(self) -> SplitFacts:
        """The split's part of the manifest."""
        return SplitFacts(
            count=self.index.count,
            image_bytes=self.image_bytes,
            index=self.index_name,
            shards=tuple(self.shards.names),
        )


def _slug(name: str) -> str:
    """The readable part of a sample's key: no dots, which end a WebDataset key."""
    stem = Path(name).name.rsplit(".", 1)[0].lower()
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in stem)[:40]


class _Tally:
    """What the manifest says about the inputs."""

    def __init__(self) -> None:
        self.kept = 0
        self.without_caption = 0
        self.dropped: Counter[str] = Counter()
        self.refused: list[LedgerRow] = []
        self._licences = Licences()
        self._seen = hashlib.sha256()

    def add(self, row: LedgerRow, judged: _Judged) -> None:
        """Count one input."""
        self._seen.update(identity(row.source, row.sha256, judged.fields))
        if judged.finding is None:
            self.kept += 1
            self.without_caption += not (judged.fields or {}).get("caption")
            self._licences.add(row.licence)
        else:
            self.dropped[judged.finding.rule] += 1
            self.refused += [row] if len(self.refused) < _NAMED else []

    def manifest(self, config: BuildConfig, splits: dict[SplitName, SplitFacts], folder: Path) -> Manifest:
        """The manifest of all that was counted and of the files in ``folder``."""
        files = {path.name: file_facts(path) for path in sorted(folder.iterdir())}
        return Manifest(
            hash=content_hash(splits, files, config.background),
            config=config,
            source_digest=self._seen.hexdigest(),
            inputs=self.kept + sum(self.dropped.values()),
            kept=self.kept,
            without_caption=self.without_caption,
            dropped=dict(sorted(self.dropped.items())),
            licences=self._licences.most(),
            splits=splits,
            files=files,
        )


def _write(inputs: Source, folder: Path, config: BuildConfig, progress: Progress) -> Manifest:
    tally = _Tally()
    total = len(inputs.items)
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own pixel limit is lower and drops them
        splits = {name: _SplitWriter(folder, name, config, stack) for name in SPLITS}
        ledger = stack.enter_context((folder / LEDGER).open("w", encoding="utf-8"))
        progress(0, total)
        for number, judged in enumerate(_in_order(inputs.items, config.clean)):
            row = _ledger_row(number, judged)
            if judged.finding is None:
                split = split_of(judged.sha256, config.held_out)
                row = splits[split].add(tally.kept, replace(row, split=split), judged)
            tally.add(row, judged)
            ledger.write(row.as_json() + "\n")
            progress(number + 1, total)
    facts = {name: writer.facts() for name, writer in splits.items()}
    _require_training(inputs, facts, tally)
    manifest = tally.manifest(config, facts, folder)
    (folder / MANIFEST).write_text(manifest.as_json(), encoding="utf-8")
    return manifest


def _ledger_row(number: int, judged: _Judged) -> LedgerRow:
    finding, fields = judged.finding, judged.fields or {}
    row = LedgerRow(
        number=number,
        source=judged.item.name,
        kept=False,
        sha256=judged.sha256.hex(),
        licence=licence_of(fields),
    )
    if finding is None:
        return row
    return replace(row, rule=finding.rule, value=finding.value, threshold=finding.threshold, detail=finding.detail)


def _require_training(inputs: Source, facts: dict[SplitName, SplitFacts], tally: _Tally) -> None:
    if facts["train"].count:
        return
    if facts["held_out"].count:
        raise DataError(
            "All pictures that were kept fell to the held-out split; none is left to train on.",
            value=facts["held_out"].count,
            rule="at least one picture to train on",
            mend="more pictures, or a smaller --held-out",
        )
    counts = ", ".join(f"{count} {rule}" for rule, count in sorted(tally.dropped.items()))
    lines = [f"{row.source}: {row.rule} {printable(row.detail)}".rstrip() for row in tally.refused]
    examples = "".join(f"\n           {line}" for line in lines)
    raise DataError(
        f"None of the {len(inputs.items)} inputs could be kept.",
        value=str(inputs.path),
        rule=f"at least one usable picture; dropped were {counts}{examples}",
        mend="mend the files, or loosen --min-side, --max-pixels or --max-bytes",
    )
