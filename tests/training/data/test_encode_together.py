"""Ranks encode what is missing together: told of, left when asked to, and shared with whoever else is at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from training import encoding
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset, Split
from training.data.encode import ensure
from training.data.encoded.cache import Cache
from training.data.encoded.image_shards import ImageShards
from training.data.encoded.place import Place
from training.data.encoded.tick import Tick
from training.data.manifest import SplitName
from training.encoding import Watch, together


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@dataclass
class Zeros:
    """A job that keeps a zero for each sample, one sample at a time.

    Attributes:
        folder: where the files go.
        encoded: the shards in the order in which they were begun.
        samples: done so far.
    """

    folder: Path
    encoded: list[str] = field(default_factory=list)
    samples: int = 0

    kind = "zeros"

    def cache(self, dataset: Dataset, split: SplitName) -> Cache:
        return Cache(Place(self.folder), ImageShards(dataset.split(split), dataset.manifest.files), self.kind, {})

    def encode(self, cache: Cache, number: int, split: Split, tick: Tick) -> int:
        del split  # zeros need no pictures
        shard = cache.shards[number]
        self.encoded.append(shard.name)
        spans = np.zeros((shard.count, 2), dtype=np.int64)
        with cache.writing(number, tables={"spans": spans}, dtype="F32", row_shape=()) as writer:
            for _ in shard.samples:
                writer.append(bytes(4))
                self.samples += 1
                tick(1)
        return 0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., bytes]) -> Dataset:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("shards") / "data"
    for number in range(90):
        (source / f"{number:03d}.png").write_bytes(encode(number, size=(130, 130)))
    build(source, out, BuildConfig(held_out=0.1, shard_mb=1))
    return Dataset.open(out)


def test_rank_zero_tells_how_far_all_are(
    alone: None, shards: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_TELL_S", -1.0)
    monkeypatch.setattr(encoding, "ROUND_S", -1.0)
    told: list[tuple[int, int]] = []
    job = Zeros(tmp_path / "kept")
    watch = Watch(lambda *step: told.append(step), lambda: False)
    assert together(shards, job, watch, part=0, parts=1)
    total = sum(split.count for split in shards.manifest.splits.values())
    assert [done for done, _ in told] == [*range(1, total + 1), total]
    assert {of for _, of in told} == {total}
    assert len(job.encoded) == len(set(job.encoded)) > 3
    again = Zeros(tmp_path / "kept")
    assert together(shards, again, watch, part=0, parts=1)
    assert again.encoded == []


def test_who_is_asked_to_leave_leaves_in_the_middle_of_a_shard(alone: None, shards: Dataset, tmp_path: Path) -> None:
    largest = max(split.count // len(split.shards) for split in shards.manifest.splits.values() if split.shards)
    first = Zeros(tmp_path / "kept")
    stop_at = largest + 1
    watch = Watch(lambda *_: None, lambda: first.samples >= stop_at)
    assert not together(shards, first, watch, part=0, parts=1)
    assert first.samples == stop_at
    assert not list(tmp_path.rglob("*.partial")), "nothing half-written stays"
    then = Zeros(tmp_path / "kept")
    assert together(shards, then, Watch(lambda *_: None, lambda: False), part=0, parts=1)
    assert set(then.encoded).isdisjoint(first.encoded[:-1])
    assert set(then.encoded) | set(first.encoded) == {
        name for split in shards.manifest.splits.values() for name in split.shards
    }


def test_processes_that_begin_together_share_the_work(
    shards: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trials of a sweep do, each of which wants all of it."""
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    first, second = Zeros(tmp_path / "one"), Zeros(tmp_path / "two")
    for job, pid in ((first, 1), (second, 2)):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        assert all(ensure(shards, "train", job))
    names = shards.manifest.splits["train"].shards
    assert sorted(first.encoded) == sorted(second.encoded) == sorted(names)
    assert first.encoded != second.encoded, "they would all do the same at the same time"
    # and what one has done meanwhile the other does not do again
    monkeypatch.setattr("os.getpid", lambda: 1)
    one, other = Zeros(tmp_path / "kept"), Zeros(tmp_path / "kept")
    begun = ensure(shards, "train", one)
    next(begun)
    assert sum(ensure(shards, "train", other)) == len(names) - 1
    assert not any(begun)
    assert len(one.encoded + other.encoded) == len(names)
