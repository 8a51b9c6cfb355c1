"""The stream: one for any number of workers, entered anywhere, and unmoved by unreadable samples."""

import errno
import itertools
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data.batch import Batch
from training.data.dataset import Dataset, Split
from training.data.loader import Loader, LoaderConfig
from training.data.order import order
from training.errors import ConfigError, DataError, StorageError, UsageError


@pytest.fixture(scope="module")
def split(built: Path) -> Split:
    return Dataset.open(built).split("train")


@pytest.fixture
def damaged(built: Path, tmp_path: Path) -> Callable[..., Split]:
    """A copy of the data set in which some pictures' bytes are overwritten."""

    def damage(*indices: int) -> Split:
        copy = tmp_path / "damaged"
        shutil.copytree(built, copy)
        index = np.load(copy / "train.index.npy", allow_pickle=False)
        with (copy / "train-000000.tar").open("r+b") as file:
            for number in indices:
                file.seek(int(index[number]["image_offset"]))
                file.write(bytes(int(index[number]["image_size"])))
        return Dataset.open(copy).split("train")

    return damage


def _take(loader: Loader, count: int, position: int = 0) -> list[Batch]:
    with loader:
        return list(itertools.islice(loader.batches(position), count))


def _same(one: Batch, other: Batch) -> bool:
    facts = [(b.captions, b.sample_ids, b.epochs, b.position) for b in (one, other)]
    return facts[0] == facts[1] and torch.equal(one.images, other.images)


def test_a_batch_is_what_it_says(split: Split) -> None:
    batch = _take(Loader(split, resolution=16, global_batch=5, seed=3), 1)[0]
    assert len(batch) == 5
    assert batch.images.shape == (5, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous()
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1
    assert batch.captions == tuple(split.caption(index) for index in batch.sample_ids)
    assert (batch.epochs, batch.position) == ((0,) * 5, 0)
    full = _take(Loader(split, resolution=24, global_batch=5, seed=3), 1)[0]
    for row, index in enumerate(batch.sample_ids):
        pixels = (full.images[row].permute(1, 2, 0) + 1) * 127.5
        assert np.array_equal(pixels.round().numpy().astype(np.uint8), split[index].image)


def test_the_stream_follows_the_order_across_epochs(split: Split) -> None:
    batches = _take(Loader(split, resolution=8, global_batch=7, seed=3), 20)
    ids = [index for batch in batches for index in batch.sample_ids]
    epochs = [epoch for batch in batches for epoch in batch.epochs]
    count = len(split)
    for position, (index, epoch) in enumerate(zip(ids, epochs, strict=True)):
        assert epoch == position // count
        assert index == order(3, epoch, np.array([position % count]), count)[0]
    assert sorted(ids[:count]) == list(range(count))
    assert [batch.position for batch in batches] == list(range(0, 140, 7))


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 200))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_union_over_ranks_is_the_whole(split: Split, world: int, position: int) -> None:
    whole = _take(Loader(split, resolution=8, global_batch=12, seed=1), 4, position)
    shares = [
        _take(Loader(split, resolution=8, global_batch=12, seed=1, rank=rank, world=world), 4, position)
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        for rank in range(world):
            share = shares[rank][step]
            assert share.position == batch.position
            assert share.sample_ids == batch.sample_ids[rank::world]
            assert share.epochs == batch.epochs[rank::world]
            assert torch.equal(share.images, batch.images[rank::world])


@given(st.integers(0, 12), st.integers(1, 4), st.sampled_from([0, 256]))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resuming_anywhere_is_the_uninterrupted_stream(split: Split, stop: int, prefetch: int, cache_mb: int) -> None:
    whole = _take(Loader(split, resolution=8, global_batch=6, seed=2), 16)
    loader = Loader(split, resolution=8, global_batch=6, seed=2, prefetch=prefetch, cache_mb=cache_mb)
    rest = _take(loader, 16 - stop, stop * 6)
    assert all(_same(one, other) for one, other in zip(rest, whole[stop:], strict=True))


def test_a_far_position_is_reached_at_once(split: Split) -> None:
    started = time.monotonic()
    batch = _take(Loader(split, resolution=8, global_batch=4, seed=0), 1, 10**15)[0]
    assert time.monotonic() - started < 1
    assert batch.position == 10**15
    assert batch.epochs[0] == 10**15 // len(split)


def test_an_unreadable_sample_is_replaced_without_moving_the_others(
    split: Split, damaged: Callable[..., Split], caplog: pytest.LogCaptureFixture
) -> None:
    whole = _take(Loader(split, resolution=8, global_batch=4, seed=5), 16)
    broken = damaged(3, 4, len(split) - 1)
    stand_in = {3: 5, 4: 5, len(split) - 1: 0}
    with caplog.at_level(logging.WARNING):
        for world in (1, 2):
            for rank in range(world):
                loader = Loader(broken, resolution=8, global_batch=4, seed=5, rank=rank, world=world)
                for batch, expected in zip(_take(loader, 16), whole, strict=True):
                    wanted = tuple(stand_in.get(index, index) for index in expected.sample_ids[rank::world])
                    assert batch.sample_ids == wanted
                    assert batch.captions == tuple(split.caption(index) for index in wanted)
                assert set(loader.skipped) <= set(stand_in)
                assert all("UnidentifiedImageError" in reason for reason in loader.skipped.values())
    assert "Skipped train[3], for it cannot be read" in caplog.text


def test_a_data_set_that_is_gone_ends_the_run_with_an_error(split: Split, damaged: Callable[..., Split]) -> None:
    broken = damaged(*range(len(split)))
    loader = Loader(broken, resolution=8, global_batch=4, seed=5)
    with loader, pytest.raises(DataError, match="samples in a row cannot be read"):
        next(loader.batches())


def test_a_shard_that_shrinks_under_a_running_job_is_an_error_with_a_name(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    split = Dataset.open(copy).split("train")
    with (copy / "train-000000.tar").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(DataError, match=r"of \d+ bytes at \d+ of train-000000.tar"):
        split[len(split) - 1]


def flaky(monkeypatch: pytest.MonkeyPatch, function: str, number: int, failures: int) -> list[float]:
    """The first calls of an ``os`` function fail; returns the pauses that were made, which take no time."""
    original, left = getattr(os, function), [failures]
    pauses: list[float] = []

    def stumble(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return original(*arguments)

    monkeypatch.setattr(os, function, stumble)
    monkeypatch.setattr("training.data.dataset.time.sleep", pauses.append)
    return pauses


@pytest.mark.parametrize(
    ("function", "number"), [("pread", errno.EIO), ("pread", errno.ESTALE), ("open", errno.EMFILE)]
)
def test_a_read_that_storage_refuses_for_a_moment_is_tried_again(
    built: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    whole = _take(Loader(Dataset.open(built).split("train"), resolution=8, global_batch=4, seed=5), 2)
    split = Dataset.open(built).split("train")
    pauses = flaky(monkeypatch, function, number, 3)
    loader = Loader(split, resolution=8, global_batch=4, seed=5)
    assert all(_same(one, other) for one, other in zip(_take(loader, 2), whole, strict=True))
    assert loader.skipped == {}
    assert len(pauses) == 3


def test_a_shard_whose_handle_went_stale_is_opened_anew(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Dataset.open(built).split("train")
    before = split.encoded(0)
    (stale,) = split._files.values()
    original = os.pread

    def pread(handle: int, size: int, offset: int) -> bytes:
        if handle == stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return original(handle, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr("training.data.dataset.time.sleep", lambda _: None)
    assert split.encoded(0) == before
    assert split._stale == [stale]
    del split
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(stale)


def test_storage_that_keeps_refusing_ends_the_run_and_skips_nothing(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Dataset.open(built).split("train")
    flaky(monkeypatch, "pread", errno.EIO, 10**6)
    with Loader(split, resolution=8, global_batch=4, seed=5) as loader:
        with pytest.raises(StorageError) as caught:
            next(loader.batches())
        assert loader.skipped == {}
    text = str(caught.value)
    assert str(built / "train-000000.tar") in text
    assert "Input/output error, 4 times" in text
    assert "goes on from the newest checkpoint" in text


def test_a_sample_with_damaged_fields_is_skipped_like_one_with_a_damaged_picture(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "fields"
    shutil.copytree(built, copy)
    record = np.load(copy / "train.index.npy", allow_pickle=False)[3]
    with (copy / "train-000000.tar").open("r+b") as file:
        file.seek(int(record["json_offset"]))
        file.write(b"?" * int(record["json_size"]))
    split = Dataset.open(copy).split("train")
    loader = Loader(split, resolution=8, global_batch=4, seed=5)
    seen = {index for batch in _take(loader, 2 * len(split) // 4) for index in batch.sample_ids}
    assert seen == set(range(len(split))) - {3}
    assert set(loader.skipped) == {3}


def test_no_more_than_the_prefetch_is_decoded_ahead(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = Loader._batch

    def counted(loader: Loader, position: int) -> Batch:
        asked.append(position)
        return original(loader, position)

    monkeypatch.setattr(Loader, "_batch", counted)
    with Loader(split, resolution=8, global_batch=4, seed=0, prefetch=3) as loader:
        stream = loader.batches()
        next(stream)
        deadline = time.monotonic() + 5
        while len(asked) < 3 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert sorted(asked) == [0, 4, 8]


def test_closing_stops_the_threads(split: Split) -> None:
    before = threading.active_count()
    loader = Loader(split, resolution=8, global_batch=4, seed=0, prefetch=4)
    next(loader.batches())
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"global_batch": 10, "world": 4}, "options: 8, 12"),
        ({"global_batch": 0}, "positive multiple of the number of workers"),
        ({"rank": 2, "world": 2}, "0 <= rank < world"),
        ({"resolution": 0}, "resolution >= 1"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, int], text: str, split: Split) -> None:
    with pytest.raises(ConfigError, match=text):
        Loader(split, **{"resolution": 8, "global_batch": 8, "seed": 0, **options})  # type: ignore[arg-type]


def test_an_empty_split_and_a_negative_position_are_refused(split: Split, pictures: Path, tmp_path: Path) -> None:
    from training.data.build import build
    from training.data.config import BuildConfig

    build(pictures, tmp_path / "out", BuildConfig(held_out=0))
    with pytest.raises(DataError, match="The held_out split is empty"):
        Loader(Dataset.open(tmp_path / "out").split("held_out"), resolution=8, global_batch=4, seed=0)
    with Loader(split, resolution=8, global_batch=4, seed=0) as loader, pytest.raises(UsageError, match="starts at 0"):
        loader.batches(-1)


def test_the_loader_opens_from_its_config(built: Path) -> None:
    with Loader.open(LoaderConfig(path=str(built), cache_mb=1), resolution=8, global_batch=4, seed=0) as loader:
        assert next(loader.batches()).position == 0
    with pytest.raises(DataError, match="darkroom data build SOURCE"):
        Loader.open(LoaderConfig(path="nowhere"), resolution=8, global_batch=4, seed=0)


def test_neither_data_nor_its_command_imports_ray_and_building_imports_no_torch() -> None:
    import subprocess
    import sys

    program = (
        "import sys, cluster.commands.data, training.data.build, training.data.dataset\n"
        "assert not {'torch', 'ray', 'webdataset'} & set(sys.modules), 'too much is imported'\n"
        "import training.data.loader\n"
        "assert 'ray' not in sys.modules, 'the loader imports ray'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
