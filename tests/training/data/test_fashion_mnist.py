"""Fashion-MNIST's idx files become a source of pictures."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.fashion_mnist import CLASSES, PARTS, convert, main, read_idx
from training.errors import DataError, UsageError

WriteIdx = Callable[..., Path]


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The package's four files, with 20 and 10 pictures."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for part, count in zip(PARTS, (20, 10), strict=True):
        pictures = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def test_pictures_and_labels_arrive(files: Path, tmp_path: Path) -> None:
    main([str(files), str(tmp_path / "fashion.tar")])
    assert convert(files, tmp_path / "again.tar") == 30
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "fashion.tar").read_bytes()
    manifest = build(tmp_path / "fashion.tar", tmp_path / "set", BuildConfig(held_out=0))
    assert (manifest.inputs, manifest.kept, manifest.licences) == (30, 30, {"MIT": 30})
    rows = list(read_ledger(tmp_path / "set"))
    split = Dataset.open(str(tmp_path / "set")).split("train")
    expected = read_idx(files / "train-images-idx3-ubyte.gz", 3)
    for index, row in enumerate(rows):
        picture, fields = split.picture(index)
        number = int(row.source.removesuffix(".png")[-5:])
        assert (fields["label"], fields["caption"]) == (number % 10, CLASSES[number % 10])
        if row.source.startswith("train"):
            assert np.array_equal(np.asarray(picture.convert("L")), expected[number])
    assert Image.fromarray(expected[0]).size == (28, 28)


@pytest.mark.parametrize(
    "damage",
    [
        b"no gzip",
        gzip.compress(b"\0\0"),
        gzip.compress(idx(np.zeros(20, np.uint8))[:-1]),
        gzip.compress(idx(np.zeros(20, np.uint8)) + b"x"),
        gzip.compress(idx(np.zeros(20, np.uint8)))[:-12],
        gzip.compress(idx(np.zeros((20, 1), np.uint8))),
        gzip.compress(b"\0\0\x0d\x01" + idx(np.zeros(20, np.uint8))[4:]),
        gzip.compress(idx(np.full(20, 10, np.uint8))),
        gzip.compress(idx(np.zeros(19, np.uint8))),
        gzip.compress(idx(np.zeros(0, np.uint8))),
        gzip.compress(b"\0\0\x08\xff" + b"\xff" * 2000),
        gzip.compress(idx(np.zeros(20, np.uint8)))[:10] + b"\xff" * 40,
    ],
    ids=range(12),
)
def test_damaged_files_are_refused_and_leave_nothing(damage: bytes, files: Path, tmp_path: Path) -> None:
    (files / "train-labels-idx1-ubyte.gz").write_bytes(damage)
    with pytest.raises(DataError):
        convert(files, tmp_path / "fashion.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


def test_missing_files_and_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train-images"):
        convert(tmp_path, tmp_path / "fashion.tar")
    with pytest.raises(UsageError, match=r"IDX_FOLDER OUT\.tar"):
        main(["one"])
