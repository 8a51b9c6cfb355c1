"""The numbers of a report, from the manifest and two passes over the ledger's columns."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from training.data.ledger import read_tables
from training.data.manifest import Manifest
from training.data.report.bias import FieldAudit, effective_number, groups_of, words_of
from training.data.report.fields import COLUMNS, Candidates, values_of
from training.data.report.histogram import Counts, Histogram, Quantity
from training.data.report.words import Meetings, Vocabulary, words_in
from training.data.storage import Folder
from training.errors import UsageError

QUANTITIES = (
    Quantity("shorter_side", "Shorter side", "pixels", "log", rule="too_small", exact=True),
    Quantity("aspect", "Shape", "width : height", "log", help="1 is square, more is wider, less is taller."),
    Quantity("caption_words", "Caption length", "words", "linear", help="0: no caption."),
    Quantity("bytes", "File size", "bytes", "log"),
    Quantity("sharpness", "Sharpness", "variance of the Laplacian", "log", rule="blurred"),
    Quantity("spread", "Contrast", "standard deviation, of 0 to 255", "linear", 0.1, rule="uniform"),
    Quantity("unsafe", "Unsafe score", "0 safe, 1 unsafe", "linear", 0.001, rule="unsafe"),
    Quantity("outlier", "Distance from the other pictures", "feature space", "log", rule="outlier"),
    Quantity("caption_match", "Caption against picture", "cosine", "linear", 0.001, rule="caption_mismatch"),
)
"""What is drawn, in this order; measures that no picture has are left out."""

_PASS_1 = ["kept", "rule", "threshold", "bytes", "width", "height", "caption", "sha256", "fields", *COLUMNS]
_MEASURES = ["sharpness", "spread", "unsafe", "outlier", "caption_match"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Dropped:
    """The inputs that one rule dropped; ``threshold`` is what it would have accepted, where that is one number."""

    rule: str
    count: int
    share: float
    threshold: float | None


@dataclass(frozen=True)
class Numbers:
    """All numbers of a report.

    Attributes:
        place: where the data set lies.
        hash: names it.
        inputs: rows of the ledger.
        kept: of these.
        without_caption: kept ones with an empty caption.
        splits: kept ones by split.
        image_bytes: of the pictures as stored.
        dropped: by rule, the commonest first; their counts and ``kept`` add up to ``inputs``.
        licences: kept ones by licence, the commonest first.
        histograms: of what is known.
        read: inputs whose fields could be read: what the audits count.
        audits: one per field.
        other_fields: fields that were not audited, with how many inputs have them.
    """

    place: str
    hash: str
    inputs: int
    kept: int
    without_caption: int
    splits: dict[str, int]
    image_bytes: int
    dropped: tuple[Dropped, ...]
    licences: dict[str, int]
    histograms: tuple[Histogram, ...]
    read: int
    audits: tuple[FieldAudit, ...]
    other_fields: dict[str, int]


def numbers(folder: Folder, manifest: Manifest, asked: Sequence[str] = (), progress: Progress | None = None) -> Numbers:
    """Count everything.

    Args:
        folder: the data set's.
        manifest: the data set's.
        asked: fields to audit; if none, those with few values.
        progress: told (rows done, rows in all), both passes counted.

    Raises:
        UsageError: a field that no input has.
    """
    first = _First(asked)
    done = 0
    for table in read_tables(folder, [*_PASS_1, *_MEASURES]):
        first.add(table)
        done += table.num_rows
        if progress:
            progress(done, 2 * manifest.inputs)
    audits = _audits(first, folder, lambda rows: progress and progress(done + rows, 2 * manifest.inputs))
    chosen = {audit.field for audit in audits}
    return Numbers(
        place=folder.place,
        hash=manifest.hash,
        inputs=first.inputs,
        kept=first.kept,
        without_caption=manifest.without_caption,
        splits={name: split.count for name, split in manifest.splits.items()},
        image_bytes=sum(split.image_bytes for split in manifest.splits.values()),
        dropped=first.rules(),
        licences=dict(sorted(manifest.licences.items(), key=lambda item: (-item[1], item[0]))),
        histograms=first.histograms(),
        read=first.candidates.inputs,
        audits=audits,
        other_fields={name: count for name, count in first.candidates.names.most_common(40) if name not in chosen},
    )


class _First:
    """The first pass: totals, rules, histograms, the values of fields, the vocabulary."""

    def __init__(self, asked: Sequence[str]) -> None:
        self.inputs = 0
        self.kept = 0
        self.candidates = Candidates(asked)
        self.vocabulary = Vocabulary()
        self._counts = {quantity.name: Counts(quantity) for quantity in QUANTITIES}
        self._rules: Counter[str] = Counter()
        self._thresholds: dict[str, set[float | None]] = defaultdict(set)

    def add(self, table: pa.Table) -> None:
        """Count one row group."""
        kept = table["kept"].to_numpy()
        self.inputs += len(kept)
        self.kept += int(kept.sum())
        rules, thresholds = table["rule"].to_pylist(), table["threshold"].to_pylist()
        self._rules.update(rule for rule in rules if rule is not None)
        for rule, threshold in zip(rules, thresholds, strict=True):
            if rule is not None and len(self._thresholds[rule]) < 2:
                self._thresholds[rule].add(threshold)
        captions = table["caption"].to_pylist()
        for caption, fields, one in zip(captions, _fields(table), kept.tolist(), strict=True):
            if one:
                self.vocabulary.add(words_in(caption))
            if fields is not None:
                self.candidates.add(fields, kept=one)
        width, height, size = (_floats(table, name) for name in ("width", "height", "bytes"))
        lengths = np.array([len(caption.split()) for caption in captions], float)
        lengths[[sha256 == "" for sha256 in table["sha256"].to_pylist()]] = np.nan  # never read: nobody knows
        known = {"shorter_side": np.minimum(width, height), "aspect": width / height}
        known |= {"caption_words": lengths, "bytes": size, **{name: _floats(table, name) for name in _MEASURES}}
        for name, values in known.items():
            self._counts[name].add(values, kept)

    def rules(self) -> tuple[Dropped, ...]:
        """What each rule dropped."""
        ranked = sorted(self._rules.items(), key=lambda item: (-item[1], item[0]))
        return tuple(Dropped(rule, count, count / self.inputs, self._threshold(rule)) for rule, count in ranked)

    def _threshold(self, rule: str) -> float | None:
        """The one that all rows of a rule agree on."""
        found = self._thresholds.get(rule, set())
        return next(iter(found)) if len(found) == 1 else None

    def histograms(self) -> tuple[Histogram, ...]:
        """Of what is known of at least one input."""
        drawn = (counts.histogram(self._threshold(counts.quantity.rule)) for counts in self._counts.values())
        return tuple(histogram for histogram in drawn if histogram.bins)


def _floats(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, NaN where nothing is."""
    values: np.ndarray = table[name].cast(pa.float64()).to_numpy()
    return values


def _fields(table: pa.Table) -> Iterator[Mapping[str, Any] | None]:
    """The fields of each input, the ledger's own columns among them; None where the input was never read."""
    columns = [table[name].to_pylist() for name in ("sha256", "fields", *COLUMNS)]
    for sha256, fields, *own in zip(*columns, strict=True):
        if sha256:
            yield {**dict(zip(COLUMNS, own, strict=True)), **json.loads(fields)}
        else:
            yield None


def _audits(first: _First, folder: Folder, progress: Callable[[int], object]) -> tuple[FieldAudit, ...]:
    """The second pass, if there is a field to audit."""
    candidates = first.candidates
    unknown = [name for name in candidates.asked if name not in candidates.chosen()]
    if unknown:
        options = [name for name, _ in candidates.names.most_common(20)]
        rule = "a field that at least one input has, with a text, a number or a list of them"
        raise UsageError("No input has this field.", value=unknown[0], rule=rule, options=options)
    groups = {name: groups_of(candidates.counts(name)) for name in candidates.chosen()}
    words = first.vocabulary.commonest()
    meetings = Meetings(words, {name: tuple(group.value for group in found) for name, found in groups.items()})
    done = 0
    for table in read_tables(folder, ["kept", "caption", "sha256", "fields", *COLUMNS]) if groups else ():
        chosen = table.filter(table["kept"])
        for caption, fields in zip(chosen["caption"].to_pylist(), _fields(chosen), strict=True):
            spoken = words_in(caption)
            meetings.add({name: values_of(fields or {}, name) for name in groups}, spoken)
        done += table.num_rows
        progress(done)
    return tuple(_audit(name, groups[name], words, meetings, candidates) for name in groups)


def _audit(
    name: str, groups: tuple[Any, ...], words: tuple[str, ...], meetings: Meetings, candidates: Candidates
) -> FieldAudit:
    met = meetings.counts(name)
    spoken, pairs = words_of(words, met.with_word, met.in_group, met.together, met.captions)
    effective, simpson = effective_number([group.kept for group in groups])
    without, without_kept = candidates.without(name)
    return FieldAudit(
        field=name,
        several=name in candidates.several,
        groups=tuple(
            replace(group, often=often, seldom=seldom) for group, (often, seldom) in zip(groups, spoken, strict=True)
        ),
        without=without,
        without_kept=without_kept,
        effective=effective,
        simpson=simpson,
        pairs_tested=pairs,
    )
