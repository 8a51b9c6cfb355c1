import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.data import remote_store
from training.data.dataset import Dataset, Split, is_dataset
from training.data.disk_cache import DiskCacheConfig
from training.data.loader_config import LoaderConfig
from training.data.manifest import SPLITS
from training.data.storage import Folder
from training.errors import DataError, StorageError


@pytest.fixture
def cache(tmp_path: Path) -> DiskCacheConfig:
    return DiskCacheConfig(folder=str(tmp_path / "cache"), size_mb=100, block_mb=1)


@pytest.fixture
def place(built: Path, bucket: str) -> str:
    """The data set in a bucket."""
    place = f"{bucket}/a set #1"
    for path in built.iterdir():
        if path.is_file():
            Folder.at(place).upload(path, path.name)
    return place


def everything(split: Split) -> list[tuple[Any, ...]]:
    return [
        (split.key(index), split.encoded(index), split.fields(index), split.encoded_with_caption(index))
        for index in range(len(split))
    ]


def test_every_sample_is_the_local_one(built: Path, place: str, cache: DiskCacheConfig) -> None:
    remote, local = Dataset.open(place, cache), Dataset.open(built)
    assert (remote.hash, remote.path, remote.folder.local) == (local.hash, place, None)
    for name in SPLITS:
        assert everything(remote.split(name)) == everything(local.split(name))
        assert np.array_equal(remote.split(name).records, local.split(name).records)
        assert isinstance(remote.split(name).records, np.memmap), "billions of records do not fit in memory"
    remote.verify()
    sample, same = remote.split("train")[3], local.split("train")[3]
    assert np.array_equal(sample.image, same.image)
    assert is_dataset(place)
    assert not is_dataset(f"{place}/nothing")


def test_the_loader_makes_the_same_batches(built: Path, place: str, cache: DiskCacheConfig) -> None:
    from training.data.loader import Loader

    batches = []
    for opened in (Dataset.open(place, cache), Dataset.open(built)):
        with Loader.open(opened, LoaderConfig(threads=2), resolution=16, global_batch=8, seed=1) as loader:
            batches.append([batch for batch, _ in zip(loader.batches(5 * 8), range(6), strict=False)])
    for remote, local in zip(*batches, strict=True):
        assert (remote.sample_ids, remote.captions, remote.valid) == (local.sample_ids, local.captions, local.valid)
        assert remote.images.equal(local.images)


def test_a_second_process_finds_the_blocks(place: str, cache: DiskCacheConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    everything(Dataset.open(place, cache).split("train"))
    opened = Dataset.open(place, cache)
    monkeypatch.setattr(remote_store, "filesystem", lambda _: pytest.fail("the storage was asked"))
    everything(opened.split("train"))


def test_a_forked_child_reads_on(place: str, cache: DiskCacheConfig) -> None:
    split = Dataset.open(place, cache).split("train")
    first = split.encoded(0)
    shutil.rmtree(Path(cache.folder) / "blocks")
    (Path(cache.folder) / "blocks").mkdir()
    child = os.fork()
    if not child:
        os._exit(0 if split.encoded(0) == first else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_is_missing_or_altered_is_named(built: Path, place: str, cache: DiskCacheConfig, bucket: str) -> None:
    with pytest.raises(DataError, match="There is no data set"):
        Dataset.open(f"{bucket}/nothing", cache)
    folder, shard = Folder.at(place), "train-000000.tar"
    data = bytearray((built / shard).read_bytes())
    folder.write(shard, data[:-512])
    with pytest.raises(DataError, match=rf"{shard} has {len(data) - 512} bytes, not {len(data)}"):
        Dataset.open(place, cache)
    local = Dataset.open(built).split("train")
    start = int(local.records[2]["image_offset"])
    data[start : start + 40] = bytes(40)
    folder.write(shard, bytes(data))
    with pytest.raises(DataError, match=f"{shard} has another sha256"):
        Dataset.open(place, cache).verify()
    split = Dataset.open(place, cache).split("train")
    with pytest.raises(DataError, match=r"train\[2\] of s3://"):
        split.picture(2)
    assert split.encoded(3) == local.encoded(3)
    folder.write("train.index.npy", bytes(folder.size("train.index.npy")))
    shutil.rmtree(cache.folder)
    with pytest.raises(DataError, match=r"damaged(.|\n)*train.index.npy"):
        Dataset.open(place, cache).split("train")
    folder.remove(shard)
    with pytest.raises(DataError, match=f"{shard} is missing"):
        Dataset.open(place, cache)


def test_a_shard_that_vanishes_is_no_damaged_sample(place: str, cache: DiskCacheConfig) -> None:
    split = Dataset.open(place, cache).split("train")
    Folder.at(place).remove("train-000000.tar")
    with pytest.raises(StorageError, match="not there any more"):
        split.encoded(0)


def test_a_server_that_dies_is_an_error_and_one_that_comes_back_goes_on(
    built: Path, place: str, cache: DiskCacheConfig, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, local = Dataset.open(place, cache).split("train"), Dataset.open(built).split("train")
    held_out = Dataset.open(place, cache).split("held_out")
    kept = split.encoded(0)
    s3_server.kill()
    try:
        assert split.encoded(0) == kept, "its block is on this machine's disk"
        with monkeypatch.context() as patch:
            patch.setattr(remote_store.time, "sleep", lambda _: None)
            with pytest.raises(StorageError, match=r"does not answer(.|\n)*AWS_ENDPOINT_URL"):
                held_out.encoded(0)
    finally:
        s3_server.start()
    assert held_out.encoded(0) == Dataset.open(built).split("held_out").encoded(0)
    assert everything(split) == everything(local)
