"""A data set without some of its samples: the shards that held them, the indexes and the ledger, written anew."""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.forgotten import Forgets
from training.data.index import IndexWriter, read_index
from training.data.ledger import LEDGER, LedgerWriter, read_tables
from training.data.licences import Licences
from training.data.manifest import Manifest, SplitFacts, content_hash, file_facts
from training.data.planning import index_name
from training.data.shards import MEMBER_BYTES, ShardWriter, file_name
from training.data.storage import Folder
from training.data.writing import target
from training.errors import DataError


@dataclass(frozen=True)
class Found:
    """What falls under the opt-outs: how many inputs, and the pictures' offsets by shard."""

    inputs: int
    offsets: dict[str, np.ndarray]


class Rewriting:
    """The files of the next generation while they are written.

    Args:
        folder: the data set's, where they go, too.
        manifest: of the data set as it is.
        found: what is left out.
        forgets: the same, by row.
    """

    def __init__(self, folder: Folder, manifest: Manifest, found: Found, forgets: Forgets) -> None:
        self._folder = folder
        self._manifest = manifest
        self._found = found
        self._forgets = forgets
        self._generation = manifest.generation + 1
        self._files = dict(manifest.files)
        self._moved: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
        self._stack = ExitStack()
        self._aside = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))

    def __enter__(self) -> Rewriting:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> Manifest:
        """Write all but the manifest, which is returned."""
        splits = {name: self._split(split, index_name(name)) for name, split in self._manifest.splits.items()}
        tally = _Tally(Counter(self._manifest.dropped))
        ledger = file_name(LEDGER, self._generation)
        with LedgerWriter(self._aside / ledger) as writer:
            for table in read_tables(self._folder):
                writer.add_rows([self._row(row, tally) for row in table.to_pylist()])
        self._upload(ledger)
        named = {ledger}.union(*((split.index, *split.shards) for split in splits.values()))
        files = {name: facts for name, facts in sorted(self._files.items()) if name in named}
        return self._manifest.model_copy(
            update={
                "hash": content_hash(splits, files, self._manifest.config.background),
                "generation": self._generation,
                "ledger": ledger,
                "kept": sum(split.count for split in splits.values()),
                "without_caption": tally.without_caption,
                "dropped": {rule: count for rule, count in sorted(tally.dropped.items()) if count},
                "licences": tally.licences.most(),
                "splits": splits,
                "files": files,
            }
        )

    def _split(self, split: SplitFacts, index: str) -> SplitFacts:
        """The split without what is forgotten; the same files where nothing of it is."""
        if not set(split.shards) & set(self._found.offsets):
            return split
        name = file_name(index, self._generation)
        shards: list[str] = []
        image_bytes = 0
        records = read_index(self._local(split.index), split.count)
        with IndexWriter(self._aside / name) as writer:
            starts = np.searchsorted(records["shard"], np.arange(len(split.shards) + 1))
            for number, shard in enumerate(split.shards):
                kept = np.array(records[starts[number] : starts[number + 1]])
                if shard in self._found.offsets:
                    kept = kept[~np.isin(kept["image_offset"].astype(np.int64), self._found.offsets[shard])]
                    if len(kept):
                        shard = self._shard(shard, kept)  # noqa: PLW2901 - the same shard under its new name
                if len(kept):
                    kept["shard"] = len(shards)
                    shards.append(shard)
                    writer.extend(kept)
                    image_bytes += int(kept["image_size"].sum(dtype=np.int64))
            count = writer.count
        self._upload(name)
        return SplitFacts(count=count, image_bytes=image_bytes, index=name, shards=tuple(shards))

    def _shard(self, shard: str, kept: np.ndarray) -> str:
        """Copy what stays into a new shard, and note in ``kept`` where it lies; returns the shard's name."""
        stem, _, ending = shard.partition(".")
        name = file_name(f"{stem}.{ending.rpartition('.')[2]}", self._generation)
        old = kept["image_offset"].astype(np.int64)
        begins = old - MEMBER_BYTES
        sizes = kept["json_size"].astype(np.int64)
        ends = kept["json_offset"].astype(np.int64) + sizes + -sizes % MEMBER_BYTES
        new = np.concatenate([[0], np.cumsum(ends - begins)[:-1]]) + MEMBER_BYTES
        with target(self._folder, name) as file:
            writer = ShardWriter(file)
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                data = self._folder.read_range(shard, begin, end - begin)
                if len(data) != end - begin:
                    raise DataError("A shard ends early.", value=self._folder.url(shard), mend="build it again")
                writer.copy(data)
            self._files[name] = writer.close()
        kept["json_offset"] += (new - old).astype(kept["json_offset"].dtype)
        kept["image_offset"] = new
        self._moved[shard] = (name, old, new)
        return name

    def _row(self, row: dict[str, Any], tally: _Tally) -> dict[str, Any]:
        finding = None if row["rule"] == "forgotten" else self._forgets(row)
        if finding is not None:
            if row["rule"]:
                tally.dropped[row["rule"]] -= 1
            tally.dropped["forgotten"] += 1
            row.update(kept=False, rule=finding.rule, value=None, threshold=None, detail=finding.detail, of=None)
            row.update(caption="", fields="{}", split=None, key=None, shard=None, offset=None)
        elif row["kept"]:
            tally.without_caption += not row["caption"]
            tally.licences.add(row["licence"])
            moved = self._moved.get(row["shard"])
            if moved is not None:
                name, old, new = moved
                row.update(shard=name, offset=int(new[np.searchsorted(old, row["offset"])]))
        return row

    def _local(self, name: str) -> Path:
        """A file of the data set as one of this machine."""
        if self._folder.local is not None:
            return self._folder.local / name
        self._folder.download(name, self._aside / f"old {name}")
        return self._aside / f"old {name}"

    def _upload(self, name: str) -> None:
        self._files[name] = file_facts(self._aside / name)
        self._folder.upload(self._aside / name, name)


@dataclass
class _Tally:
    """What the manifest says about the rows."""

    dropped: Counter[str]
    without_caption: int = 0

    def __post_init__(self) -> None:
        self.licences = Licences()
