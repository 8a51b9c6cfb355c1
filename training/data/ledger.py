"""The ledger: one line per input of a build, kept or dropped and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.data.manifest import SplitName

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class LedgerRow:
    """What became of one input.

    Attributes:
        number: position in the sorted source, from 0.
        source: the input's name within the source.
        kept: whether it is in a shard.
        rule: the rule that dropped it.
        value: what the rule found.
        threshold: what the rule would have accepted.
        detail: the reason in words.
        sha256: of the encoded picture, ``""`` where it was not read.
        licence: as stated beside the picture.
        split: ``train`` or ``held_out``.
        key: the sample's WebDataset key.
        shard: the shard's file name.
        offset: of the picture's bytes within the shard.
    """

    number: int
    source: str
    kept: bool
    rule: str | None = None
    value: int | str | None = None
    threshold: int | str | None = None
    detail: str = ""
    sha256: str = ""
    licence: str = ""
    split: SplitName | None = None
    key: str | None = None
    shard: str | None = None
    offset: int | None = None

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))


def read_ledger(dataset: Path) -> Iterator[LedgerRow]:
    """The ledger of a finished data set, in the order of its source."""
    with (dataset / LEDGER).open(encoding="utf-8") as file:
        for line in file:
            yield LedgerRow(**json.loads(line))
