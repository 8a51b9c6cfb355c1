"""Buckets: shapes near one area, the nearest one for each picture, and lists of who is where."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.buckets import Bucket, BucketsConfig, Members, account, assign, buckets_of, waste
from training.data.index import DTYPE
from training.errors import StorageError

WIDE = BucketsConfig(aspect_limit=2, step=32, resolutions=(64,))


def records(*sizes: tuple[int, int]) -> np.ndarray:
    """An index that says no more than how large pictures are."""
    found = np.zeros(len(sizes), DTYPE)
    found["width"], found["height"] = np.array(sizes).reshape(-1, 2).T
    return found


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """An index of pictures of all sizes."""
    rng = np.random.default_rng(seed)
    return records(*rng.integers(20, 400, (count, 2)).tolist())


def test_without_a_word_every_picture_becomes_a_square() -> None:
    assert buckets_of(28, BucketsConfig()) == (Bucket(28, 28, 28),)


@given(st.integers(16, 1024), st.floats(1, 16), st.integers(1, 128))
def test_shapes_are_as_large_as_the_area_and_the_limit_allow(resolution: int, limit: float, step: int) -> None:
    shapes = buckets_of(resolution, BucketsConfig(aspect_limit=limit, step=step))
    assert Bucket(resolution, resolution, resolution) in shapes
    assert list(shapes) == sorted(shapes, key=lambda each: each.width / each.height)
    assert len({each.width / each.height for each in shapes}) == len(shapes)
    for each in shapes:
        assert Bucket(each.height, each.width, resolution) in shapes
        assert max(each[:2]) <= limit * min(each[:2])
        if each.width != each.height:
            assert each.width * each.height <= resolution**2 < (min(each[:2]) + step) * max(each[:2])
            assert not each.width % step
            assert not each.height % step


@given(st.lists(st.tuples(st.integers(1, 70_000), st.integers(1, 70_000)), min_size=1, max_size=30))
def test_each_picture_goes_to_the_shape_that_is_nearest(sizes: list[tuple[int, int]]) -> None:
    shapes = buckets_of(128, WIDE)
    found = assign(*np.array(sizes).T, shapes)
    for (width, height), number in zip(sizes, found.tolist(), strict=True):
        resolution = 128 if width * height >= 128 * 128 else 64
        distances = [
            abs(np.log(width / height * each.height / each.width)) if each.resolution == resolution else np.inf
            for each in shapes
        ]
        assert distances[number] <= min(distances) + 1e-12
    alone = [int(assign(np.array([w]), np.array([h]), shapes)[0]) for w, h in sizes]
    assert alone == found.tolist()


def test_a_picture_of_unknown_size_is_a_small_square() -> None:
    shapes = buckets_of(128, WIDE)
    assert shapes[assign(np.array([0]), np.array([0]), shapes)[0]] == Bucket(64, 64, 64)


def test_waste_is_what_the_cuts_leave_out() -> None:
    square, wide = Bucket(32, 32, 32), Bucket(64, 16, 32)
    assert waste(records((64, 64), (32, 32)), (square,)).cut == 0
    half = waste(records((128, 64), (64, 128)), (square,))
    assert (half.cut, half.enlarged, half.looked_at) == (0.5, 0, 2)
    fitting = waste(records((128, 32), (16, 16)), (square, wide))
    assert (fitting.cut, fitting.enlarged) == (0, 0.5)
    assert waste(records((0, 0)), (square,)).looked_at == 0
    assert waste(drawn(1000), (square,), at_most=100).looked_at == 100


def test_the_account_says_it_in_one_line() -> None:
    squares = (Bucket(32, 32, 32),)
    assert account(records((128, 64)), Members(squares, (1,))) == (
        "pictures are cut to 32 x 32 (1); 50.0% of all pixels lie outside the cuts, 0.0% of the pictures are enlarged,"
        " none is padded"
    )
    assert "does not say" in account(records((0, 0)), Members(squares, (1,)))


@given(st.integers(0, 9), st.integers(1, 400), st.integers(1, 40))
def test_every_sample_is_in_one_bucket_and_none_is_too_small(seed: int, count: int, fewest: int) -> None:
    index = drawn(count, seed)
    cache = Path(os.environ["PYTEST_BUCKETS"])
    members = Members.open(index, buckets_of(128, WIDE), fewest=fewest, data_hash=f"{seed}", cache=cache)
    listed = [members.ids(number, np.arange(size)) for number, size in enumerate(members.counts)]
    assert sorted(np.concatenate(listed).tolist()) == list(range(count))
    for number, ids in enumerate(listed):
        assert (np.diff(ids) > 0).all()  # in the order of the index, so that neighbours stay neighbours
        assert (assign(index["width"][ids], index["height"][ids], members.buckets) == number).all()
    assert min(members.counts) >= fewest or len(members.counts) == 1


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """hypothesis calls a test many times, and each call may find the lists of another."""
    os.environ["PYTEST_BUCKETS"] = str(tmp_path_factory.mktemp("buckets"))


def test_the_lists_are_written_once_and_mapped(tmp_path: Path) -> None:
    index, shapes = drawn(500), buckets_of(128, WIDE)
    first = Members.open(index, shapes, fewest=20, data_hash="one", cache=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "buckets").iterdir() if path.suffix != ".lock"}
    again = Members.open(index, shapes, fewest=20, data_hash="one", cache=tmp_path)
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "buckets").iterdir() if path.suffix != ".lock"
    } == written
    assert (again.buckets, again.counts) == (first.buckets, first.counts)
    assert isinstance(again._ids, np.memmap)
    Members.open(index, shapes, fewest=20, data_hash="two", cache=tmp_path)
    assert len(list((tmp_path / "buckets").glob("*.npy"))) == 2


def test_one_shape_needs_no_list(tmp_path: Path) -> None:
    members = Members.open(drawn(10), buckets_of(32, BucketsConfig()), fewest=4, data_hash="x", cache=tmp_path / "no")
    assert members.ids(0, np.array([3, 1])).tolist() == [3, 1]
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("ending", "left"), [("npy", None), ("npy", 100), ("npy", 0), ("json", 0), ("json", 5)])
def test_lists_that_a_crash_of_the_machine_left_damaged_are_made_again(
    tmp_path: Path, ending: str, left: int | None
) -> None:
    index, shapes = drawn(500), buckets_of(128, WIDE)
    first = Members.open(index, shapes, fewest=20, data_hash="one", cache=tmp_path)
    (path,) = (tmp_path / "buckets").glob(f"*.{ending}")
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    again = Members.open(index, shapes, fewest=20, data_hash="one", cache=tmp_path)
    assert (again.buckets, again.counts) == (first.buckets, first.counts)
    everyone = [again.ids(bucket, np.arange(count)) for bucket, count in enumerate(again.counts)]
    assert sorted(np.concatenate(everyone).tolist()) == list(range(500))


def test_processes_that_begin_together_sort_once(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path; from training.data import buckets\n"
        "from training.data.index import DTYPE\n"
        "index = np.zeros(200_000, DTYPE); index['width'] = 1 + np.arange(200_000) % 700; index['height'] = 300\n"
        "shapes = buckets.buckets_of(128, buckets.BucketsConfig(aspect_limit=4, step=8))\n"
        "members = buckets.Members.open(index, shapes, fewest=64, data_hash='x', cache=Path(sys.argv[1]))\n"
        "print(members.counts, sum(members.ids(0, np.arange(members.counts[0])).tolist()))\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(set(told)) == 1
    assert sorted(path.suffix for path in (tmp_path / "buckets").iterdir()) == [".json", ".lock", ".npy"]


def test_a_cache_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"data\.disk_cache\.folder"):
        Members.open(drawn(10), buckets_of(128, WIDE), fewest=1, data_hash="x", cache=tmp_path / "file")


def test_a_full_disk_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left on device"):
        Members.open(drawn(500), buckets_of(128, WIDE), fewest=20, data_hash="one", cache=tmp_path)
