"""What the loader does about samples that cannot be read, and about storage that does not answer."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.data.streams import loader_of, same, take
from training.data.dataset import Dataset, Split
from training.data.shard_files import LocalShards
from training.errors import DataError, StorageError


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


def test_an_unreadable_sample_is_a_row_of_zeros_and_moves_no_other(
    split: Split, damaged: Callable[..., Split], caplog: pytest.LogCaptureFixture
) -> None:
    whole = take(loader_of(split, 4, 5), 16)
    gone = {3, 4, len(split) - 1}
    broken = damaged(*gone)
    with caplog.at_level(logging.WARNING):
        for world in (1, 2):
            for rank in range(world):
                loader = loader_of(broken, 4, 5, rank=rank, world=world)
                for batch, expected in zip(take(loader, 16), whole, strict=True):
                    assert batch.sample_ids == expected.sample_ids[rank::world]
                    for row, index in enumerate(batch.sample_ids):
                        assert batch.valid[row] == (index not in gone)
                        wanted = expected.images[rank::world][row] if index not in gone else torch.zeros(3, 8, 8)
                        assert torch.equal(batch.images[row], wanted.to(torch.uint8))
                        assert batch.captions[row] == ("" if index in gone else split.caption(index))
                        assert bool(batch.sizes[row].any()) == (index not in gone)
                assert set(loader.skipped) <= gone
                assert all("Unidentified" in why or "tjDecompressHeader3" in why for why in loader.skipped.values())
    told = [record.message for record in caplog.records if "Sample 3 is left out" in record.message]
    assert 1 <= len(told) <= 3  # once by each loader that met it


def test_a_data_set_that_is_gone_is_rows_that_are_not_valid(split: Split, damaged: Callable[..., Split]) -> None:
    """Whoever adds up over the ranks decides; one rank alone cannot know."""
    loader = loader_of(damaged(*range(len(split))), 4, 5)
    assert not any(any(batch.valid) for batch in take(loader, 8))
    assert len(loader.skipped) == len(split)


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
    monkeypatch.setattr("training.data.shard_files.time.sleep", pauses.append)
    return pauses


@pytest.mark.parametrize(
    ("function", "number"), [("pread", errno.EIO), ("pread", errno.ESTALE), ("open", errno.EMFILE)]
)
def test_a_read_that_storage_refuses_for_a_moment_is_tried_again(
    built: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    whole = take(loader_of(Dataset.open(built).split("train"), 4, 5), 2)
    split = Dataset.open(built).split("train")
    pauses = flaky(monkeypatch, function, number, 3)
    loader = loader_of(split, 4, 5)
    assert all(same(one, other) for one, other in zip(take(loader, 2), whole, strict=True))
    assert loader.skipped == {}
    assert len(pauses) == 3


def test_a_shard_whose_handle_went_stale_is_opened_anew(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Dataset.open(built).split("train")
    before = split.encoded(0)
    shards = split._files
    assert isinstance(shards, LocalShards)
    (stale,) = shards._files.values()
    original = os.pread

    def pread(handle: int, size: int, offset: int) -> bytes:
        if handle == stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return original(handle, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr("training.data.shard_files.time.sleep", lambda _: None)
    assert split.encoded(0) == before
    assert shards._stale == [stale]
    del split, shards
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(stale)


def test_storage_that_keeps_refusing_ends_the_run_and_skips_nothing(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Dataset.open(built).split("train")
    flaky(monkeypatch, "pread", errno.EIO, 10**6)
    with loader_of(split, 4, 5) as loader:
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
    loader = loader_of(split, 4, 5)
    batches = take(loader, 2 * len(split) // 4)
    assert {i for each in batches for i, valid in zip(each.sample_ids, each.valid, strict=True) if not valid} == {3}
    assert set(loader.skipped) == {3}
