import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.disk_cache import DiskCache, DiskCacheConfig
from training.data.disk_space import DiskSpace
from training.data.storage import Folder
from training.errors import DataError, StorageError

LENGTH = 100_000
BYTES = np.random.default_rng(1).integers(0, 256, LENGTH, dtype=np.uint8).tobytes()


class CountingFolder(Folder):
    """A folder that knows which blocks it was asked for; the cache is made for slower ones."""

    asked: list[int]

    def read_range(self, name: str, start: int, size: int) -> bytes:
        self.asked.append(start)
        return super().read_range(name, start, size)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CountingFolder:
    folder = CountingFolder(str(tmp_path_factory.mktemp("source")))
    folder.write("shard", BYTES)
    return folder


@pytest.fixture(autouse=True)
def _asked(source: CountingFolder) -> None:
    object.__setattr__(source, "asked", [])


def blocks(cache: DiskCache) -> list[Path]:
    return sorted(path for path in (cache.folder / "blocks").rglob("*-*") if path.is_file())


def read(cache: DiskCache, source: Folder, start: int, size: int, version: str = "v") -> bytes:
    return cache.read(source, "shard", version, LENGTH, start, size)


def settled(cache: DiskCache) -> DiskCache:
    """Once nothing is fetched ahead any more."""
    for thread in threading.enumerate():
        if getattr(thread, "_target", None) == cache._fetch_ahead:
            thread.join()
    return cache


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskCache]:
    folder = tmp_path_factory.mktemp("shared")
    yield DiskCache(folder, 20_000, 1000)
    shutil.rmtree(folder)


@given(start=st.integers(0, LENGTH + 10), size=st.integers(0, 9000))
def test_a_range_is_what_the_file_holds_whatever_is_kept(
    shared: DiskCache, source: CountingFolder, start: int, size: int
) -> None:
    assert read(shared, source, start, size) == BYTES[start : start + size]
    assert sum(path.stat().st_size for path in blocks(settled(shared))) <= 20_000


def test_a_block_is_fetched_once(tmp_path: Path, source: CountingFolder) -> None:
    cache = DiskCache(tmp_path, 1_000_000, 1000)
    for start in (5100, 5900, 5000):
        assert read(cache, source, start, 100) == BYTES[start : start + 100]
    again = DiskCache(tmp_path, 1_000_000, 1000)
    assert read(again, source, 5999, 1) == BYTES[5999:6000]
    assert source.asked == [5000]
    assert read(again, source, 5999, 1, version="another") == BYTES[5999:6000]
    assert source.asked == [5000, 5000], "another version of the file is another block"


def test_reading_on_fetches_the_next_block_before_it_is_asked_for(tmp_path: Path, source: CountingFolder) -> None:
    cache = DiskCache(tmp_path, 1_000_000, 1000)
    read(cache, source, 30_500, 10)
    settled(cache)
    assert source.asked == [30_000], "one read says nothing of the next"
    read(cache, source, 31_500, 10)
    settled(cache)
    assert source.asked == [30_000, 31_000, 32_000]
    read(cache, source, 32_500, 10)
    settled(cache)
    read(cache, source, 99_990, 10)
    settled(cache)
    assert source.asked == [30_000, 31_000, 32_000, 33_000, 99_000]


@pytest.mark.parametrize("damage", ["cut short", "zeros", "empty", "longer"])
def test_a_block_that_a_crash_left_is_not_believed(tmp_path: Path, source: CountingFolder, damage: str) -> None:
    read(DiskCache(tmp_path, 1_000_000, 1000), source, 5000, 10)
    (path,) = blocks(DiskCache(tmp_path, 1_000_000, 1000))
    data = path.read_bytes()
    path.write_bytes({"cut short": data[:500], "zeros": bytes(len(data)), "empty": b"", "longer": data + b"x"}[damage])
    for _ in range(2):
        assert read(DiskCache(tmp_path, 1_000_000, 1000), source, 5000, 10) == BYTES[5000:5010]
    assert source.asked == [5000, 5000], "fetched anew, once"
    assert path.read_bytes() == data


def test_the_longest_unused_go_first(tmp_path: Path, source: CountingFolder) -> None:
    cache = DiskCache(tmp_path, 10 * 1004, 1000)
    for block in range(0, 20, 2):  # not one after the other, so that none is fetched ahead
        read(cache, source, 1000 * block, 1)
    read(cache, source, 0, 1)
    read(cache, source, 40_000, 1)
    source.asked.clear()
    read(cache, source, 0, 1)
    assert source.asked == [], "used since"
    read(cache, source, 2000, 1)
    assert source.asked == [2000]


def test_the_bound_holds_at_every_moment_for_all_processes_together(tmp_path: Path, source: CountingFolder) -> None:
    limit = 12 * 1004
    children = []
    DiskCache(tmp_path, limit, 1000)
    for seed in range(3):
        child = os.fork()
        if not child:
            code = 1
            try:
                cache = DiskCache(tmp_path, limit, 1000)
                for start in np.random.default_rng(seed).integers(0, LENGTH - 700, 200).tolist():
                    if read(cache, source, start, 700) != BYTES[start : start + 700]:
                        break
                else:
                    code = 0
            finally:
                os._exit(code)
        children.append(child)
    most, status = 0, dict.fromkeys(children, None)
    while None in status.values():
        for child in [child for child, code in status.items() if code is None]:
            done, code = os.waitpid(child, os.WNOHANG)
            status[child] = code if done else None
        most = max(most, _taken(tmp_path / "blocks"))
    assert set(status.values()) == {0}
    assert 6 * 1004 < most <= limit


def _taken(folder: Path) -> int:
    """What lies in the folder while nobody may take more; a file that is renamed meanwhile is counted once."""
    sizes: dict[int, int] = {}
    with (folder / "taken").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for inner in folder.iterdir():
            for entry in os.scandir(inner) if inner.is_dir() else ():
                with suppress(FileNotFoundError):
                    facts = entry.stat()
                    sizes[facts.st_ino] = facts.st_size
    return sum(sizes.values())


def test_a_full_disk_makes_reading_slower_and_nothing_else(
    tmp_path: Path, source: CountingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskSpace, "write", full)
    cache = DiskCache(tmp_path, 1_000_000, 1000)
    assert read(cache, source, 5000, 10) == BYTES[5000:5010]
    assert blocks(cache) == []


def test_without_a_cache_only_what_is_asked_for_is_read(tmp_path: Path, source: CountingFolder) -> None:
    cache = DiskCacheConfig(folder=str(tmp_path), size_mb=0).open()
    assert read(cache, source, 5003, 10) == BYTES[5003:5013]
    assert (source.asked, blocks(cache)) == ([5003], [])


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"data\.disk_cache\.folder"):
        DiskCacheConfig(folder=str(tmp_path / "file" / "below")).open()


def test_a_whole_file_is_believed_once_its_checksum_is_right(tmp_path: Path, source: CountingFolder) -> None:
    cache = DiskCache(tmp_path, 0, 1000)
    right = hashlib.sha256(BYTES).hexdigest()
    path = cache.whole(source, "shard", right, LENGTH)
    assert path.read_bytes() == BYTES
    path.write_bytes(BYTES[:10])
    assert cache.whole(source, "shard", right, LENGTH).read_bytes() == BYTES, "cut short, and fetched anew"
    with pytest.raises(DataError, match="is damaged"):
        cache.whole(source, "shard", "0" * 64, LENGTH)
    with pytest.raises(DataError, match="is missing"):
        cache.whole(source, "gone", "1" * 64, LENGTH)
    assert [kept.name for kept in (tmp_path / "indexes").iterdir()] == [path.name]
    os.utime(path, (0, 0))
    source.write("another", b"1")
    other = cache.whole(source, "another", hashlib.sha256(b"1").hexdigest(), 1)
    assert [kept.name for kept in (tmp_path / "indexes").iterdir()] == [other.name], "not opened for a month"
