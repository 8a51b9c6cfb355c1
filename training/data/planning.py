"""The third stage of a build: what is kept, on which side, and where it will lie; pure functions of the parts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from training.data.clean import CleanConfig, decide
from training.data.clean.decide import outlier_scores
from training.data.config import BuildConfig
from training.data.findings import Finding
from training.data.index import IndexWriter
from training.data.ledger import SCHEMA, LedgerWriter
from training.data.licences import Licences
from training.data.manifest import SPLITS, SplitFacts, SplitName
from training.data.shards import Packer, file_name, shard_name
from training.data.sources import Item

_NAMED = 5
"""Dropped inputs that an error names."""

_DECIDED = ["number", "source", "digest", "caption", "phash", "thumbnail", "features"]
"""The columns of a part that the rules over the whole set look at."""


@dataclass(frozen=True)
class PlannedSample:
    """One sample of a shard.

    Attributes:
        number: of its input.
        key: its WebDataset key.
        kind: the file ending of its picture.
        digest: sha256 of the bytes that are stored.
        fields: its JSON.
        part: the part that it was judged in.
        offset: of its bytes among the part's staged pictures; None where the source is read again.
        size: of the stored bytes.
        item: where it is read again.
    """

    number: int
    key: str
    kind: str
    digest: bytes
    fields: bytes
    part: str
    offset: int | None
    size: int
    item: Item | None


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its file name and its samples in order."""

    name: str
    samples: tuple[PlannedSample, ...]

    @property
    def seconds(self) -> float:
        """How long it takes to write, roughly."""
        return sum(sample.size for sample in self.samples) / 150e6 + 0.00015 * len(self.samples)

    def describe(self) -> str:
        """The shard for an error."""
        return self.name


@dataclass
class _Open:
    """A split while it is planned."""

    packer: Packer
    index: IndexWriter
    shards: list[str] = field(default_factory=list)
    samples: list[PlannedSample] = field(default_factory=list)
    image_bytes: int = 0


def index_name(split: SplitName) -> str:
    """The file name of a split's index, in the first generation."""
    return f"{split}.index.npy"


def split_of(digest: bytes, held_out: float) -> SplitName:
    """The split of a picture, by its bytes alone: a copy never lands on the other side.

    Args:
        digest: the sha256 of the encoded picture.
        held_out: the share to hold out.
    """
    return "held_out" if int.from_bytes(digest[8:16], "big") < held_out * 2**64 else "train"


@dataclass(frozen=True)
class Decisions:
    """What the rules over the whole set say, by the inputs' numbers.

    Attributes:
        findings: about those that are refused.
        outlier: how far an input is from the rest, where that was asked for.
        kept: inputs that no rule refuses.
    """

    findings: Mapping[int, Finding]
    outlier: Mapping[int, float]
    kept: int


def decided(parts: Iterable[pa.Table], config: CleanConfig) -> Decisions:
    """Judge the inputs that passed alone by each other."""
    names = ["sha256" if name == "digest" else name for name in _DECIDED]
    passed = (part.filter(pa.compute.is_null(part["rule"])).select(_DECIDED) for part in parts)
    table = pa.concat_tables(passed).rename_columns(names)
    scores = outlier_scores(table, config) if config.outliers.enabled else {}
    findings = decide(table, config, scores)
    return Decisions(findings, scores, table.num_rows - len(findings))


class Planner:
    """Plans block after block; writes ledger and index as it goes, and counts for the manifest.

    Args:
        config: what is asked for.
        generation: of the files' names.
        decisions: what was decided over the whole set.
        forgotten: why an input that would be kept was forgotten; None where it was not.
        ledger: open.
        indexes: open.
    """

    def __init__(
        self,
        config: BuildConfig,
        generation: int,
        decisions: Decisions,
        forgotten: Callable[[Mapping[str, Any]], Finding | None],
        ledger: LedgerWriter,
        indexes: Mapping[SplitName, IndexWriter],
    ) -> None:
        self.kept = 0
        self.without_caption = 0
        self.dropped: Counter[str] = Counter()
        self.refused: list[tuple[str, str, str]] = []
        self.licences = Licences()
        self._seen = hashlib.sha256()
        self._config = config
        self._generation = generation
        self._decisions = decisions
        self._forgotten = forgotten
        self._ledger = ledger
        self._open = {name: _Open(Packer(config.shard_mb * 1_000_000), indexes[name]) for name in SPLITS}

    @property
    def source_digest(self) -> str:
        """Of the inputs planned so far; see ``origin``."""
        return self._seen.hexdigest()

    @property
    def inputs(self) -> int:
        """Those planned so far."""
        return self.kept + self.dropped.total()

    def shards(self, name: str, part: pa.Table, items: tuple[Item, ...] | None) -> Iterator[ShardPlan]:
        """Plan one part: the shards that it completes.

        Args:
            name: the part's.
            part: all its columns.
            items: its inputs, where the source is read again.
        """
        rows = part.to_pylist()
        for place, row in enumerate(rows):
            self._seen.update(row["identity"])
            row["outlier"] = self._decisions.outlier.get(row["number"])
            finding = None if row["rule"] else self._decisions.findings.get(row["number"]) or self._forgotten(row)
            if finding is not None:
                row.update(rule=finding.rule, value=finding.value, threshold=finding.threshold)
                row.update(detail=finding.detail, of=finding.of)
            if row["rule"]:
                self.dropped[row["rule"]] += 1
                self.refused += [(row["source"], row["rule"], row["detail"])] if len(self.refused) < _NAMED else []
            else:
                yield from self._keep(name, row, items[place] if items else None)
        columns = [pa.array([row[column.name] for row in rows], column.type) for column in SCHEMA]
        self._ledger.add_table(pa.Table.from_arrays(columns, schema=SCHEMA))

    def rest(self) -> Iterator[ShardPlan]:
        """The shards that are not full, when all parts are planned."""
        for name in SPLITS:
            yield from self._complete(name)

    def splits(self) -> dict[SplitName, SplitFacts]:
        """The splits' parts of the manifest."""
        return {
            name: SplitFacts(
                count=split.index.count,
                image_bytes=split.image_bytes,
                index=file_name(index_name(name), self._generation),
                shards=tuple(split.shards),
            )
            for name, split in self._open.items()
        }

    def _keep(self, part: str, row: dict[str, Any], item: Item | None) -> Iterator[ShardPlan]:
        name = split_of(row["digest"], self._config.held_out)
        split, fields = self._open[name], row["fields"].encode()
        before, placed = split.packer.shard, split.packer.place(row["stored_bytes"], len(fields))
        if placed.shard != before:
            yield from self._complete(name)
            split.shards.append(shard_name(name, placed.shard, self._generation))
        key = f"{self.kept:08d}-{_slug(row['source'])}"
        digest, size = row["stored_digest"], row["stored_bytes"]
        split.index.append(
            (
                placed.shard,
                size,
                len(fields),
                placed.image_offset,
                placed.json_offset,
                int.from_bytes(digest[:8], "big"),
                row["stored_width"],
                row["stored_height"],
                row["stored_direct"],
            )
        )
        split.samples.append(
            PlannedSample(
                row["number"], key, row["stored_kind"], digest, fields, part, row["stored_offset"], size, item
            )
        )
        split.image_bytes += size
        row.update(kept=True, split=name, key=key, shard=split.shards[-1], offset=placed.image_offset)
        self.kept += 1
        self.without_caption += not row["caption"]
        self.licences.add(row["licence"])

    def _complete(self, name: SplitName) -> Iterator[ShardPlan]:
        split = self._open[name]
        if split.samples:
            yield ShardPlan(split.shards[-1], tuple(split.samples))
            split.samples = []


def _slug(name: str) -> str:
    """The readable part of a sample's key: no dots, which end a WebDataset key."""
    stem = Path(name).name.rsplit(".", 1)[0].lower()
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in stem)[:40]
