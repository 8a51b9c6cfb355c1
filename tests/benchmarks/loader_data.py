"""JPEG shards for the loader's benchmark: pictures like photographs, the same every time, as plain WebDataset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.dataset import Split
from training.data.index import DTYPE, IndexWriter, read_index
from training.data.manifest import SplitFacts
from training.data.shard_files import LocalShards

_SHARDS = 8
_LAYERS = ((4, 90), (8, 50), (16, 28), (32, 18), (64, 12))
"""Cells of a smooth random field and how strong it is: each octave about half as strong, as in photographs."""


def photo(side: int, number: int) -> bytes:
    """A JPEG of quality 90: smooth fields of all sizes and the noise of a sensor, 0.35 bytes a pixel."""
    rng = np.random.default_rng((side, number))
    pixels = np.full((side, side, 3), 128, np.float32)
    for cells, strength in _LAYERS:
        field = rng.standard_normal((3, cells, cells)).astype(np.float32)
        for channel in range(3):
            smooth = Image.fromarray(field[channel]).resize((side, side), Image.Resampling.BICUBIC)
            pixels[..., channel] += strength * np.asarray(smooth)
    pixels += 5 * rng.standard_normal((side, side, 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photos(side: int, different: int, copies: int) -> Iterator[tuple[str, bytes]]:
    """Keys and pictures; each picture comes several times, with a comment of its own."""
    with ProcessPoolExecutor() as pool:
        made = list(pool.map(partial(photo, side), range(different), chunksize=16))
    for number in range(different * copies):
        comment = f"copy {number // different}".encode()
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        picture = made[number % different]
        yield f"{number:06d}", picture[:2] + marker + picture[2:]


def write(folder: Path, side: int, different: int, copies: int) -> None:
    """Shards and their index."""
    folder.mkdir()
    total = different * copies
    with IndexWriter(folder / "train.index.npy") as index, ExitStack() as opened:
        shards: dict[int, tarfile.TarFile] = {}
        for number, (key, picture) in enumerate(photos(side, different, copies)):
            shard = number * _SHARDS // total
            if shard not in shards:
                path = folder / f"train-{shard:06d}.tar"
                shards[shard] = opened.enter_context(tarfile.open(path, "w", format=tarfile.USTAR_FORMAT))
            fields = json.dumps({"caption": f"picture {key}"}).encode()
            at = [_add(shards[shard], f"{key}.{kind}", data) for kind, data in (("jpg", picture), ("json", fields))]
            index.append((shard, len(picture), len(fields), at[0], at[1], 0, side, side, 1))


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> int:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    start = shard.offset + tarfile.BLOCKSIZE
    shard.addfile(header, io.BytesIO(data))
    return start


def split(folder: Path) -> Split:
    """The shards as a split of a data set."""
    shards = tuple(path.name for path in sorted(folder.glob("train-*.tar")))
    count = np.load(folder / "train.index.npy", mmap_mode="r").shape[0]
    records = read_index(folder / "train.index.npy", count)
    facts = SplitFacts(count=count, image_bytes=0, shards=shards, index="train.index.npy")
    return Split(str(folder), "train", facts, records, LocalShards(folder), (255, 255, 255))


def write_billion(folder: Path, like: Path, count: int, touched: np.ndarray) -> None:
    """An index of ``count`` samples, nearly all of it a hole in the file, over the shards of another folder.

    Args:
        folder: where to.
        like: whose shards and records.
        count: samples.
        touched: the samples that will be read; they get real records.
    """
    folder.mkdir()
    for path in like.glob("train-*.tar"):
        (folder / path.name).symlink_to(path)
    index = np.lib.format.open_memmap(folder / "train.index.npy", mode="w+", dtype=DTYPE, shape=(count,))
    real = np.load(like / "train.index.npy", mmap_mode="r")
    index[touched] = real[np.arange(len(touched)) % len(real)]
    index.flush()
