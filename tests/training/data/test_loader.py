"""The stream: one for any number of workers, entered anywhere, and unmoved by unreadable samples."""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.training.data.streams import loader_of, same, take
from training.data.augment import AugmentConfig
from training.data.buckets import BucketsConfig
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset, Split
from training.data.loader import Loader, LoaderConfig
from training.data.pixels import PixelReader, Row
from training.data.schedule import Schedule
from training.errors import ConfigError, DataError, UsageError


@pytest.fixture(scope="module")
def split(built: Path) -> Split:
    return Dataset.open(built).split("train")


def test_a_batch_is_what_it_says(split: Split) -> None:
    batch = take(loader_of(split, 5, 3, resolution=16), 1)[0]
    assert len(batch) == 5
    assert batch.images.shape == (5, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.captions == tuple(split.caption(index) for index in batch.sample_ids)
    assert (batch.epochs, batch.position, batch.bucket) == ((0,) * 5, 0, 0)
    assert batch.valid == (True,) * 5
    assert batch.sizes.tolist() == [[24, 24, 0, 0, 16, 16]] * 5
    full = take(loader_of(split, 5, 3, resolution=24), 1)[0]
    for row, index in enumerate(batch.sample_ids):
        assert np.array_equal(full.images[row].permute(1, 2, 0).numpy(), split[index].image)


def test_the_stream_follows_the_schedule_across_epochs(split: Split) -> None:
    loader = loader_of(split, 8, 3)
    batches = take(loader, 20)
    for number, batch in enumerate(batches):
        plan = loader.schedule.batch(number)
        assert batch.sample_ids == tuple(plan.ids.tolist())
        assert batch.epochs == tuple(plan.epochs.tolist())
        assert batch.position == plan.position == 8 * number
    ids = [index for batch in batches for index in batch.sample_ids]
    assert sorted(ids[: len(split)]) == list(range(len(split)))
    assert any(len(set(batch.epochs)) == 2 for batch in batches), "no short batch at the end of an epoch: it is shared"


@given(st.integers(1, 12), st.integers(0, 16))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_union_over_ranks_is_the_whole(split: Split, world: int, number: int) -> None:
    position = 12 * number
    whole = take(loader_of(split, 12, 1), 4, position)
    shares = [take(loader_of(split, 12, 1, rank=rank, world=world), 4, position) for rank in range(world)]
    for step, batch in enumerate(whole):
        for rank in range(world):
            share = shares[rank][step]
            assert len(share) in (12 // world, -(-12 // world))
            assert share.position == batch.position
            assert share.sample_ids == batch.sample_ids[rank::world]
            assert share.epochs == batch.epochs[rank::world]
            assert torch.equal(share.images, batch.images[rank::world])


def test_two_passes_are_equal(split: Split) -> None:
    varied = AugmentConfig(flip=0.5, crop="random", zoom=1.5, rotate_degrees=10, brightness=0.2, saturation=0.2)
    one, other = (take(loader_of(split, 6, 4, augment=varied, threads=threads), 12) for threads in (1, 3))
    assert all(same(*pair) for pair in zip(one, other, strict=True))


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_killed_anywhere_and_resumed_at_any_world_size_reads_exactly_the_stream(
    split: Split, lives: list[tuple[int, int]], varied: bool, cached: bool
) -> None:
    """Each life of the run has a world size and takes some steps; what it decoded ahead is lost with it."""
    augment = AugmentConfig(flip=0.5, crop="random", zoom=1.3) if varied else AugmentConfig()
    steps, pieces = 0, []
    for world, taken in lives:
        shares = [
            take(
                loader_of(
                    split, 12, 2, rank=rank, world=world, augment=augment, cache_mb=cached, prefetch=1 + rank % 3
                ),
                taken,
                steps * 12,
            )
            for rank in range(world)
        ]
        pieces += [[share[step] for share in shares] for step in range(taken)]
        steps += taken
    whole = take(loader_of(split, 12, 2, augment=augment), steps)
    for batch, ranks in zip(whole, pieces, strict=True):
        for rank, share in enumerate(ranks):
            part = slice(rank, None, len(ranks))
            assert share.position == batch.position
            assert (share.sample_ids, share.epochs) == (batch.sample_ids[part], batch.epochs[part])
            assert torch.equal(share.images, batch.images[part])
            assert torch.equal(share.sizes, batch.sizes[part])


def test_a_far_position_is_reached_at_once(split: Split) -> None:
    batch = take(loader_of(split, 4, 0), 1, 10**15)[0]
    assert batch.position == 10**15
    assert batch.epochs[0] == 10**15 // len(split)


def test_buckets_are_not_mixed(built: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number in range(24):
        size = [(48, 24), (24, 48), (32, 32)][number % 3]
        (folder / f"{number:02d}.png").write_bytes(encode(number, size=size))
    build(folder, tmp_path / "data", BuildConfig(held_out=0))
    dataset = Dataset.open(tmp_path / "data")
    config = LoaderConfig(buckets=BucketsConfig(aspect_limit=2, step=8), cache_mb=1)
    shapes = set()
    with Loader.open(dataset, config, resolution=32, global_batch=4, seed=0) as loader:
        for batch in itertools.islice(loader.batches(), 12):
            height, width = batch.images.shape[2:]
            shapes.add((width, height))
            bucket = loader.schedule.members.buckets[batch.bucket]
            assert (bucket.width, bucket.height) == (width, height)
            assert {dataset.split("train").picture(index)[0].size for index in batch.sample_ids} == {
                {(40, 24): (48, 24), (24, 40): (24, 48), (32, 32): (32, 32)}[width, height]
            }
    assert len(shapes) == 3


def test_batches_that_are_kept_are_not_written_over(split: Split) -> None:
    batches = take(loader_of(split, 4, 0), 30)
    again = take(loader_of(split, 4, 0), 30)
    assert all(same(*pair) for pair in zip(batches, again, strict=True))


def test_memory_is_bounded_and_used_again(split: Split) -> None:
    with loader_of(split, 8, 0, resolution=64, prefetch=2) as loader:
        places = {batch.images.data_ptr() for batch in itertools.islice(loader.batches(), 40)}
        assert len(places) <= 5
        assert loader.buffer_bytes == 5 * 8 * 64 * 64 * 3
        assert "batches take up to 0 MB" in loader.account()


def test_the_cache_stops_at_its_limit(split: Split) -> None:
    reader = PixelReader(split, AugmentConfig(), seed=0, cache_mb=1)
    row = np.empty((320, 320, 3), np.uint8)
    for index in range(10):
        reader.read(index, 0, row)
    assert len(reader._cache) == 3
    assert PixelReader(split, AugmentConfig(crop="random"), seed=0, cache_mb=1).cache_bytes == 0


def test_no_more_than_the_prefetch_is_decoded_ahead(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = PixelReader.read

    def counted(reader: PixelReader, sample_id: int, epoch: int, row: np.ndarray) -> Row:
        asked.append(sample_id)
        return original(reader, sample_id, epoch, row)

    monkeypatch.setattr(PixelReader, "read", counted)
    with loader_of(split, 4, 0, prefetch=3) as loader:
        stream = loader.batches()
        for taken in range(1, 4):
            next(stream)
            deadline = time.monotonic() + 20
            while len(asked) < 4 * (taken + 3) and time.monotonic() < deadline:
                threading.Event().wait(0.01)
            wanted = [loader.schedule.batch(number).ids.tolist() for number in range(taken + 3)]
            assert sorted(asked) == sorted(itertools.chain(*wanted))


def test_closing_stops_the_threads(split: Split) -> None:
    before = threading.active_count()
    loader = loader_of(split, 4, 0, prefetch=4)
    next(loader.batches())
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"global_batch": 3, "world": 4}, "global_batch >= 4, the number of workers"),
        ({"global_batch": 0}, "global_batch >= 1"),
        ({"rank": 2, "world": 2}, "0 <= rank < world"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, int], text: str, split: Split) -> None:
    with pytest.raises(ConfigError, match=text):
        loader_of(split, options.pop("global_batch", 8), 0, **options)


def test_a_position_where_no_batch_begins_is_refused(split: Split) -> None:
    with loader_of(split, 4, 0) as loader:
        for position in (-4, 6):
            with pytest.raises(UsageError, match="0 or a multiple of 4"):
                loader.batches(position)


def test_the_loader_opens_from_its_config(built: Path, pictures: Path, tmp_path: Path) -> None:
    config = LoaderConfig(cache_mb=1, threads=1)
    with Loader.open(Dataset.open(built), config, resolution=8, global_batch=4, seed=0) as loader:
        assert next(loader.batches()).position == 0
        assert "decodes on 1 threads" in loader.account()
    build(pictures, tmp_path / "out", BuildConfig(held_out=0))
    with pytest.raises(DataError, match="The split is empty"):
        Schedule.open(Dataset.open(tmp_path / "out"), config, resolution=8, global_batch=4, seed=0, split="held_out")


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
