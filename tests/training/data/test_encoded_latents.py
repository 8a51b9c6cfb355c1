"""Kept latents: those of encoding online within a stated tolerance, whatever the type, mirrored or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from training import noise
from training.autoencoder import Autoencoder, LatentSpace
from training.autoencoder import autoencoder_directory as checked
from training.data.augment import AugmentConfig, draw
from training.data.buckets import BucketsConfig
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.encode import encode as encode_data
from training.data.encoded.latent_reader import LatentReader
from training.data.encoded.latents import LatentsJob, as_network_sees
from training.data.loader import Loader
from training.data.loader_config import LoaderConfig
from training.data.pixels import PixelReader
from training.data.schedule import Schedule
from training.errors import ConfigError, DataError, StorageError
from training.latents_config import LatentsConfig

SIDE, SEED = 32, 7
TOLERANCE = {"fp32": 2e-5, "bf16": 2**-5, "fp16": 2**-8}
"""Of latents of about unit size: the order of sums; 8 and 11 bits of mean and standard deviation."""


@pytest.fixture(scope="module")
def vae(autoencoder_directory: Path) -> Path:
    """The tiny autoencoder."""
    return autoencoder_directory


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., bytes]) -> Path:
    """A data set of several shards with wide, tall and square pictures, JPEG and PNG."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("set") / "data"
    sizes = [(120, 60), (60, 120), (90, 90), (320, 320)]
    for number in range(40):
        kind = "JPEG" if number % 2 else "PNG"
        (source / f"{number:03d}.{kind.lower()}").write_bytes(encode(number, size=sizes[number % 4], kind=kind))
        (source / f"{number:03d}.txt").write_text(f"picture {number}")
    build(source, out, BuildConfig(held_out=0.1, shard_mb=1))
    return out


@pytest.fixture
def data(tmp_path: Path, many: Path) -> Dataset:
    """A copy that a test may change."""
    shutil.copytree(many, tmp_path / "data")
    return Dataset.open(tmp_path / "data")


def job(vae: Path, dtype: str = "fp32", **options: object) -> LatentsJob:
    return LatentsJob(LatentsConfig(autoencoder=str(vae), dtype=dtype), SIDE, **options)


def online(
    dataset: Dataset, vae: Path, sample_id: int, epoch: int, augment: AugmentConfig, side: int = SIDE
) -> np.ndarray:
    """The latent of a sample without any cache, by diffusers' own posterior."""
    pixels = np.zeros((1, side, side, 3), dtype=np.uint8)
    PixelReader(dataset.split("train"), augment, seed=SEED).read(sample_id, epoch, pixels[0])
    autoencoder = Autoencoder(vae)
    posterior = autoencoder.model.encode(as_network_sees(torch.from_numpy(pixels))).latent_dist
    drawn = noise.normal(SEED, epoch, sample_id, "posterior", shape=tuple(posterior.mean.shape[1:]))
    config = autoencoder.model.config
    latent = (posterior.mean + posterior.std * drawn - config.shift_factor) * config.scaling_factor
    return latent[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_cached_equals_online(data: Dataset, vae: Path, dtype: str) -> None:
    kept = job(vae, dtype, flips=True)
    done = encode_data(data, kept)
    assert done.made == done.shards >= 3
    augment = AugmentConfig(flip=0.5)
    reader = LatentReader.open(data, "train", kept, augment, seed=SEED)
    row = np.zeros(reader.row_shape(SIDE, SIDE), dtype=reader.dtype)
    assert row.shape == (16, 16, 4)
    mirrored = set()
    for sample_id, epoch in [(0, 0), (1, 0), (17, 3), (30, 1), (2, 5), (2, 6), (2, 7)]:
        told = reader.read(sample_id, epoch, row)
        assert told.caption == data.split("train").caption(sample_id)
        mirrored.add(draw(augment, SEED, epoch, sample_id).flip)
        expected = online(data, vae, sample_id, epoch, augment)
        assert np.abs(row - expected).max() < TOLERANCE[dtype]
        assert np.abs(row[:, ::-1] - expected).max() > 0.1, "the mirror image is another one"
    assert mirrored == {True, False}


def test_every_epoch_draws_anew_from_the_posterior(data: Dataset, vae: Path) -> None:
    encode_data(data, job(vae))
    reader = LatentReader.open(data, "train", job(vae), AugmentConfig(), seed=SEED)
    rows = np.zeros((3, 16, 16, 4), dtype=np.float32)
    for row, epoch in zip(rows, (0, 1, 0), strict=True):
        reader.read(3, epoch, row)
    assert np.array_equal(rows[0], rows[2])
    assert not np.array_equal(rows[0], rows[1])


def test_the_loader_delivers_latents_of_each_shape(data: Dataset, vae: Path) -> None:
    config = LoaderConfig(buckets=BucketsConfig(aspect_limit=2, step=8))
    kept = job(vae, buckets=config.buckets, fewest=4)
    encode_data(data, kept)
    schedule = Schedule.open(data, config, resolution=SIDE, global_batch=4, seed=SEED)
    shapes = {(each.height // 2, each.width // 2) for each in schedule.members.buckets}
    assert len(shapes) == 3
    reader = LatentReader.open(data, "train", kept, config.augment, seed=SEED)
    seen = set()
    with Loader(schedule, reader, threads=2) as loader:
        batches = loader.batches()
        for _ in range(12):
            batch = next(batches)
            assert all(batch.valid)
            assert batch.images.dtype == torch.float32
            assert batch.images.shape[:2] == (4, 4)
            seen.add(tuple(batch.images.shape[2:]))
    assert seen == shapes


def test_a_picture_that_cannot_be_read_is_a_row_that_is_not_valid(data: Dataset, vae: Path) -> None:
    split = data.split("train")
    record = split.records[4]
    with (data.path / split.shards[int(record["shard"])]).open("r+b") as file:
        file.seek(int(record["image_offset"]))
        file.write(b"\0" * int(record["image_size"]))
    assert encode_data(data, job(vae)).unreadable == 1
    reader = LatentReader.open(data, "train", job(vae), AugmentConfig(), seed=SEED)
    row = np.zeros((16, 16, 4), dtype=np.float32)
    with pytest.raises(DataError, match="could not be encoded"):
        reader.read(4, 0, row)
    for neighbour in (3, 5):
        reader.read(neighbour, 0, row)
        assert np.abs(row - online(data, vae, neighbour, 0, AugmentConfig())).max() < TOLERANCE["fp32"]


def test_a_file_that_is_gone_ends_the_run_and_skips_nothing(data: Dataset, vae: Path) -> None:
    encode_data(data, job(vae))
    cache = job(vae).cache(data, "train")
    (cache.place.path / cache.name(0)).unlink()
    reader = LatentReader.open(data, "train", job(vae), AugmentConfig(), seed=SEED)
    with pytest.raises(StorageError, match="An encoded shard cannot be read"):
        reader.read(0, 0, np.zeros((16, 16, 4), dtype=np.float32))


def test_everything_that_changes_the_latents_changes_the_key(data: Dataset, vae: Path, tmp_path: Path) -> None:
    copy, edited = tmp_path / "copy", tmp_path / "edited"
    shutil.copytree(vae, copy)
    shutil.copytree(vae, edited)
    config = edited / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.7', '"scaling_factor": 0.8'))
    grey = data.manifest.config.model_copy(update={"background": "grey"})
    other = Dataset(data.path, data.manifest.model_copy(update={"config": grey}))

    def key(job: LatentsJob, dataset: Dataset = data) -> str:
        return job.cache(dataset, "train").key

    keys = [
        key(job(vae)),
        key(job(vae, "fp16")),
        key(job(edited)),
        key(job(vae, flips=True)),
        key(job(vae, scaled=False)),
        key(job(vae, buckets=BucketsConfig(aspect_limit=2, step=8))),
        key(LatentsJob(LatentsConfig(autoencoder=str(vae), dtype="fp32"), 64)),
        key(job(vae), other),
    ]
    assert len(set(keys)) == len(keys)
    assert key(job(copy)) == keys[0], "a copy of the autoencoder is the same one, wherever it lies"


@pytest.mark.parametrize(
    ("augment", "told"),
    [
        (AugmentConfig(crop="random"), "data.augment.crop=random"),
        (AugmentConfig(flip=0.5, zoom=1.5), "data.augment.zoom=1.5"),
        (AugmentConfig(rotate_degrees=5), "data.augment.rotate_degrees=5.0"),
        (AugmentConfig(contrast=0.1), "data.augment.contrast=0.1"),
    ],
)
def test_what_varies_from_epoch_to_epoch_cannot_be_kept(
    data: Dataset, vae: Path, augment: AugmentConfig, told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        LatentReader.open(data, "train", job(vae, flips=True), augment, seed=SEED)
    text = str(caught.value)
    assert "at random cannot be kept" in text
    assert f"value:   '{told}'" in text
    assert "options: data.augment.flip, pixels" in text


def test_flips_are_asked_for_when_encoding(data: Dataset, vae: Path) -> None:
    with pytest.raises(ConfigError, match="darkroom data encode --flip"):
        LatentReader.open(data, "train", job(vae), AugmentConfig(flip=0.5), seed=SEED)


def test_decoding_undoes_the_scale_and_shift(vae: Path) -> None:
    autoencoder = Autoencoder(vae)
    moments = autoencoder.moments(torch.zeros(2, 3, 8, 8))
    latents = autoencoder.space.draw(moments, torch.zeros(2, 4, 4, 4))
    straight = autoencoder.model.decode(moments[:, :4]).sample
    assert torch.allclose(autoencoder.decode(latents), straight, atol=1e-5)


def test_the_space_of_an_autoencoder_with_means_and_deviations(vae: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    config = folder / "config.json"
    text = config.read_text().replace('"latents_mean": null', '"latents_mean": [1, 2, 3, 4]')
    config.write_text(text.replace('"latents_std": null', '"latents_std": [2, 2, 2, 2]'))
    space = LatentSpace.of(folder)
    assert space.shift.flatten().tolist() == [1, 2, 3, 4]
    assert torch.allclose(space.scale.flatten(), torch.full((4,), 0.35))
    latents = torch.randn(2, 4, 3, 3)
    assert torch.allclose(space.undo((latents - space.shift) * space.scale), latents, atol=1e-6)


def test_what_is_no_autoencoder_is_refused_in_words(vae: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(vae, pipeline / "vae")
    pickled = tmp_path / "pickled"
    shutil.copytree(vae, pickled)
    next(pickled.glob("*.safetensors")).rename(pickled / "diffusion_pytorch_model.bin")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    for folder, words in [
        (tmp_path / "none", "a directory with a diffusers config.json of an AutoencoderKL"),
        (pipeline, f"options: {pipeline / 'vae'}"),
        (pickled, "pickled ones are not read"),
        (other, "not of a UNet2DConditionModel"),
    ]:
        with pytest.raises(ConfigError) as caught:
            checked(folder)
        assert words in str(caught.value)
        assert str(folder) in str(caught.value)


def test_a_size_that_the_autoencoder_does_not_take_is_refused(data: Dataset, vae: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        encode_data(data, LatentsJob(LatentsConfig(autoencoder=str(vae)), 31))
    assert "value:   '31x31'" in str(caught.value)
    assert "multiples of 2 pixels" in str(caught.value)
