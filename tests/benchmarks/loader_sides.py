"""One side of the loader's benchmark, in a process of its own: prints its figures as JSON.

python -m tests.benchmarks.loader_sides SIDE FOLDER PIXELS IMAGES [PEERS]
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from tests.benchmarks.loader_data import split
from training.data.augment import AugmentConfig
from training.data.buckets import Bucket, Members
from training.data.loader import Loader
from training.data.order import BLOCK, WINDOW
from training.data.pixels import PixelReader
from training.data.schedule import Schedule

ROWS = 64
WORKERS = 2
BILLION = 1_000_000_000
FAR = 10_000_000 // ROWS * ROWS

Figures = dict[str, float]


def schedule(count: int, side: int) -> Schedule:
    """Squares in the default order."""
    members = Members((Bucket(side, side, side),), (count,))
    return Schedule(members, global_batch=ROWS, seed=0, block=BLOCK, window=WINDOW)


def rate(batches: Iterable[Any], images: int) -> float:
    """Images per second after the first batches, which wait for threads and processes to start."""
    each = iter(batches)
    for _ in range(4):
        next(each)
    began, seen = time.perf_counter(), 0
    while seen < images:
        next(each)
        seen += ROWS
    return seen / (time.perf_counter() - began)


def ours(folder: Path, side: int, images: int) -> Figures:
    """Our loader, decoding every picture."""
    data = split(folder)
    reader = PixelReader(data, AugmentConfig(), seed=0)
    before = _peak_mb()
    with Loader(schedule(len(data), side), reader, threads=WORKERS) as loader:
        found = rate(loader.batches(), images)
        return {"rate": found, "bound_mb": loader.buffer_bytes / 1e6, "grown_mb": _peak_mb() - before}


def floor(folder: Path, side: int, images: int) -> Figures:
    """Bare decoding of pictures that are in memory already, on all cores."""
    del side
    data = split(folder)
    pictures = [data.encoded(number) for number in range(len(data))]

    def decode(number: int) -> None:
        simplejpeg.decode_jpeg(pictures[number])

    return {"rate": _in_processes(decode, len(data), images, multiprocessing.cpu_count())}


def processes(folder: Path, side: int, images: int) -> Figures:
    """What worker processes could reach at best: our reader in each of them, and no batch handed over."""
    data = split(folder)
    reader = PixelReader(data, AugmentConfig(), seed=0)
    rows = np.zeros((ROWS, *reader.row_shape(side, side)), reader.dtype)

    def read(number: int) -> None:
        reader.read(number, 0, rows[number % ROWS])

    return {"rate": _in_processes(read, len(data), images, WORKERS)}


def _in_processes(work: Callable[[int], None], count: int, images: int, workers: int) -> float:
    """Pictures per second of forked processes that share them out."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(workers + 1)

    def run(first: int) -> None:
        work(first)
        start.wait()
        for number in range(first, images, workers):
            work(number % count)

    forked = [context.Process(target=run, args=(first,)) for first in range(workers)]
    for process in forked:
        process.start()
    start.wait()
    began = time.perf_counter()
    for process in forked:
        process.join()
    return images / (time.perf_counter() - began)


def _webdataset(folder: Path, images: int, decoded: Callable[[Any], Any]) -> Figures:
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000)
    batches = webdataset.WebLoader(
        decoded(data).to_tuple("jpg", "json").batched(ROWS), batch_size=None, num_workers=WORKERS
    )
    return {"rate": rate(batches.repeat(), images)}


def webdataset_default(folder: Path, side: int, images: int) -> Figures:
    """WebDataset as its documentation has it: Pillow, two worker processes."""
    del side
    return _webdataset(folder, images, lambda data: data.decode("rgb8"))


def webdataset_simplejpeg(folder: Path, side: int, images: int) -> Figures:
    """WebDataset with a faster decoder put in."""
    del side

    def jpeg(key: str, data: bytes) -> Any:
        return simplejpeg.decode_jpeg(data) if key.endswith("jpg") else None

    return _webdataset(folder, images, lambda data: data.decode(jpeg, "rgb8"))


def streaming(folder: Path, side: int, images: int) -> Figures:
    """MosaicML streaming over the same pictures, as its JPEG encoding decodes them."""
    del side
    import torch

    library = streaming_library()

    class Pictures(library.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, number: int) -> Any:
            sample = super().__getitem__(number)
            return np.array(sample["jpg"]), sample["caption"]

    data = Pictures(local=str(folder / "mds"), shuffle=True, batch_size=ROWS)
    loader = torch.utils.data.DataLoader(data, batch_size=ROWS, num_workers=WORKERS, drop_last=True)
    return {"rate": rate(loader, min(images, len(data) - 8 * ROWS))}


def streaming_library() -> Any:
    """The package without its ready-made vision and text data sets, which need torchvision."""
    for name in ("vision", "text", "multimodal"):
        sys.modules[f"streaming.{name}"] = types.ModuleType(f"streaming.{name}")
    return importlib.import_module("streaming")


def to_streaming(folder: Path, side: int, images: int) -> Figures:
    """Write the pictures byte for byte as streaming's shards."""
    del side, images
    data = split(folder)
    columns = {"jpg": "jpeg", "caption": "str"}
    writer = streaming_library().MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=1 << 25)
    encoding = importlib.import_module("streaming.base.format.mds.encodings").JPEG
    encoding.encode = lambda self, data: data  # noqa: ARG005  it would encode the decoded picture once more
    with writer:
        for number in range(len(data)):
            writer.write({"jpg": data.encoded(number), "caption": data.caption(number)})
    return {"rate": 0.0}


def resume(folder: Path, side: int, images: int) -> Figures:
    """The first batch at a far position of a billion samples, from opening the index on."""
    del images
    before = _peak_mb()
    began = time.perf_counter()
    data = split(folder)
    reader = PixelReader(data, AugmentConfig(), seed=0)
    with Loader(schedule(len(data), side), reader, threads=WORKERS) as loader:
        (batch,) = itertools.islice(loader.batches(FAR), 1)
        seconds = time.perf_counter() - began
    if len(data) != BILLION or batch.position != FAR or not all(batch.valid):
        raise RuntimeError("the far batch is not what was asked for")
    return {"rate": 0.0, "seconds": seconds, "grown_mb": _peak_mb() - before}


def _peak_mb() -> float:
    """The most memory that this process had in use so far, mapped pages included."""
    # getrusage would count what the parent had when it forked
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Run the side that the command line names."""
    name, folder, side, images, *peers = sys.argv[1:]
    sys.path[:0] = peers
    sides = (ours, floor, processes, webdataset_default, webdataset_simplejpeg, streaming, to_streaming, resume)
    run = {each.__name__: each for each in sides}[name]
    print("FIGURES " + json.dumps(run(Path(folder), int(side), int(images))))


if __name__ == "__main__":
    main()
