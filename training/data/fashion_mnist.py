"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) from its idx files as a tar of PNG + JSON pairs.

``python -m training.data.fashion_mnist IDX_FOLDER OUT.tar``; ``make fashion-mnist`` fetches the files first.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.captions import canonical
from training.errors import DataError, UsageError

CLASSES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""The captions, by label."""

PARTS = ("train", "t10k")
"""60,000 pictures to train on, 10,000 to test with; both become inputs, and a build holds out what it is told to."""

_BYTES = 0x08
"""The idx type of unsigned bytes, the only one here."""

_MAX_BYTES = 1_000_000_000
"""What an idx file may unpack into: twenty times what these do."""


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An array from a gzip-compressed idx file of unsigned bytes.

    Args:
        path: two zero bytes, the type, the number of dimensions, each dimension as 4 bytes, big end first, the values.
        dimensions: how many there must be.

    Raises:
        DataError: missing, damaged, or another kind of idx file.
    """
    try:
        with gzip.open(path) as file:
            zeros, kind, count = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{count}I", file.read(4 * count))
            expected = min(math.prod(shape), _MAX_BYTES)
            values = file.read(expected + 1)  # a stream that goes on for ever is not read to its end
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError("The idx file cannot be read.", value=str(path), rule=str(error)) from error
    if (zeros, kind, count, len(values)) != (0, _BYTES, dimensions, math.prod(shape)):
        found = f"type {kind:#04x}, {count} dimensions, {len(values)} of {math.prod(shape)} values"
        rule = f"type {_BYTES:#04x}, {dimensions} dimensions, every value there and nothing behind"
        raise DataError("The idx file is not what it should be.", value=f"{path}: {found}", rule=rule)
    return np.frombuffer(values, np.uint8).reshape(shape)


def _pairs(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Member names and contents: each picture, then what is known about it."""
    for part in PARTS:
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        highest = int(labels.max(initial=0))
        if len(images) != len(labels) or highest >= len(CLASSES):
            value = f"{len(images)} pictures, {len(labels)} labels up to {highest}"
            raise DataError(
                "Pictures and labels do not fit.", value=value, rule=f"a label below {len(CLASSES)} for each picture"
            )
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            yield f"{part}-{number:05d}.png", buffer.getvalue()
            name = CLASSES[label]
            fields = {"caption": name, "label": label, "class": name, "part": part, "licence": "MIT"}
            yield f"{part}-{number:05d}.json", canonical({**fields, "creator": "Zalando SE"})


def convert(folder: Path, out: Path) -> int:
    """Write the tar, whole or not at all; equal idx files give equal bytes.

    Args:
        folder: holds the four idx files.
        out: the tar.

    Returns:
        The number of pictures.

    Raises:
        DataError: an idx file is missing or damaged.
        OSError: the disk is full or gone.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    members = 0
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in _pairs(folder):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
                archive.members.clear()  # type: ignore[attr-defined]  # it keeps all, for a walk that never comes
                members += 1
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return members // 2


def main(arguments: list[str]) -> None:
    """The command line.

    Raises:
        UsageError: not two arguments.
        DataError: an idx file is missing or damaged.
    """
    if len(arguments) != 2:
        raise UsageError("Two arguments are needed.", value=" ".join(arguments), rule="IDX_FOLDER OUT.tar")
    count = convert(Path(arguments[0]), Path(arguments[1]))
    sys.stdout.write(f"{count} pictures in {arguments[1]}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
