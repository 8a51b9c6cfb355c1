"""The fourth stage of a build: shard by shard, pictures are read again, compared and written."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from training.data.clean import CleanConfig
from training.data.findings import RefusedError
from training.data.local_store import written
from training.data.manifest import FileFacts
from training.data.parts import part_name, pictures_name
from training.data.planning import PlannedSample, ShardPlan
from training.data.shards import ShardWriter
from training.data.storage import Folder
from training.errors import DataError


@dataclass(frozen=True)
class WriteShard:
    """Writes shards; it pickles.

    Attributes:
        parts: the folder of the parts.
        notes: the folder of the notes about finished shards.
        made: where the shards go.
        clean: how the source is read.
    """

    parts: Folder
    notes: Folder
    made: Folder
    clean: CleanConfig

    def __call__(self, plan: ShardPlan) -> FileFacts:
        """Write one shard; one that is there already, of the same plan, is left as it is.

        Raises:
            DataError: a picture is not what was judged; its block will be judged anew.
            StorageError: storage refuses, or does not answer.
            OSError: the disk is full.
        """
        digest = _digest(plan)
        known = self._known(plan.name, digest)
        if known is not None:
            return known
        with target(self.made, plan.name) as file:
            shard = ShardWriter(file)
            for sample in plan.samples:
                shard.add(sample.key, sample.kind, self._picture(sample), sample.fields)
            facts = shard.close()
        note = {"plan": digest, "facts": facts.model_dump()}
        self.notes.write(f"{plan.name}.json", json.dumps(note).encode())
        return facts

    def _known(self, name: str, digest: str) -> FileFacts | None:
        try:
            note = json.loads(self.notes.read(f"{name}.json"))
            if note["plan"] == digest and self.made.size(name) == note["facts"]["size_bytes"]:
                return FileFacts.model_validate(note["facts"])
        except FileNotFoundError:
            pass
        return None

    def _picture(self, sample: PlannedSample) -> bytes:
        if sample.offset is not None:
            name = pictures_name(sample.part)
            data, place = self.parts.read_range(name, sample.offset, sample.size), self.parts.url(name)
        elif sample.item is not None:
            place = sample.item.name
            try:
                data, _ = sample.item.fetch(self.clean)
            except RefusedError as error:
                raise self._changed(sample, place, str(error)) from error
        else:
            raise RuntimeError(f"sample {sample.number} has neither staged bytes nor a source")
        if hashlib.sha256(data).digest() != sample.digest:
            raise self._changed(sample, place, "its sha256 is another one now")
        return data

    def _changed(self, sample: PlannedSample, place: str, reason: str) -> DataError:
        self.parts.remove(part_name(sample.part))
        return DataError(
            "A picture changed while the data set was built.",
            value=place,
            rule=f"the bytes that were judged are the bytes that are written: {reason}",
            mend="run the same command again: what was judged with it is judged anew, the rest is kept",
        )


def _digest(plan: ShardPlan) -> str:
    """Names a shard's content: what is written is a function of it."""
    seen = hashlib.sha256()
    for sample in plan.samples:
        seen.update(json.dumps([sample.key, sample.kind, sample.size, len(sample.fields)]).encode())
        seen.update(sample.digest + sample.fields)
    return seen.hexdigest()


@contextmanager
def target(folder: Folder, name: str) -> Iterator[IO[bytes]]:
    """A file that appears in ``folder`` when it is whole."""
    if folder.local is not None:
        with written(folder.local / name) as file:
            yield file
    else:
        with tempfile.NamedTemporaryFile() as aside:
            yield aside.file
            aside.flush()
            folder.upload(Path(aside.name), name)
