"""Kept text states: those of the encoder to the bit, keyed by all that they depend on, made once, mended if damaged."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from training.conditioning import TextConfig, TextEncoder
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.encode import encode as encode_data
from training.data.encode import ensure
from training.data.encoded.cache import ABOUT
from training.data.encoded.text import TextCache, TextJob
from training.data.executor import LocalExecutor
from training.data.forget import forget
from training.data.forgotten import OptOut
from training.data.manifest import MANIFEST
from training.data.storage import Folder
from training.errors import StorageError

PICTURES = 60


@pytest.fixture(scope="module")
def config(text_directory: Path) -> TextConfig:
    return TextConfig(encoder=str(text_directory), max_tokens=12)


@pytest.fixture(scope="module")
def job(config: TextConfig) -> TextJob:
    return TextJob(config)


@pytest.fixture(scope="module")
def encoder(config: TextConfig) -> TextEncoder:
    return TextEncoder.from_config(config)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., bytes], job: TextJob) -> Dataset:
    """A data set of several shards with its states: some pictures without a caption, some captions more than once."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("set") / "data"
    for number in range(PICTURES):
        (source / f"{number:03d}.png").write_bytes(encode(number, size=(130, 130)))
        if number % 3:
            (source / f"{number:03d}.txt").write_text(f"a {'very ' * (number % 15)}blue cat number {number // 4}")
    build(source, out, BuildConfig(held_out=0.1, shard_mb=1))
    dataset = Dataset.open(out)
    done = encode_data(dataset, job)
    assert done.made == done.shards == len(dataset.split("train").shards) + 1 >= 4
    return dataset


@pytest.fixture
def data(tmp_path: Path, encoded: Dataset) -> Dataset:
    """A copy that a test may change."""
    shutil.copytree(encoded.path, tmp_path / "data")
    return Dataset.open(tmp_path / "data")


def folder(dataset: Dataset, job: TextJob) -> Path:
    return job.cache(dataset, "train").place.path


def files(dataset: Dataset, job: TextJob) -> dict[str, tuple[int, int]]:
    """Every encoded file by its name: which file it is, and when it was written."""
    found = folder(dataset, job).glob("*.safetensors")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def captions(dataset: Dataset) -> list[str]:
    split = dataset.split("train")
    return [split.caption(index) for index in range(len(split))]


def test_batches_are_told_what_a_list_of_all_captions_would_tell_them(
    encoded: Dataset, encoder: TextEncoder, config: TextConfig
) -> None:
    whole = encoder.encode(captions(encoded))
    cache = TextCache.open(encoded, "train", config)
    assert len({len(caption) for caption in captions(encoded)}) > 5
    for start in range(0, len(whole), 7):
        ids = [(start * 31 + each) % len(whole) for each in range(7)]
        old, new = whole.rows(torch.tensor(ids)), cache.rows(ids)
        assert torch.equal(old.mask, new.mask)
        assert torch.allclose(old.tokens, new.tokens, atol=1e-6)
        assert float(new.tokens[~new.mask].abs().max()) == 0
    assert new.tokens.shape == (7, 12, encoder.width)
    assert new.tokens.dtype == torch.float32


def test_in_batches_of_the_same_shape_the_states_are_the_same_bits(
    encoded: Dataset, encoder: TextEncoder, config: TextConfig
) -> None:
    told = captions(encoded)[:20]
    now = encoder.encode([*told, *["padding"] * 44], batch=64)
    kept = TextCache.open(encoded, "train", config).rows(range(20))
    assert torch.equal(kept.tokens, now.tokens[:20])
    assert torch.equal(kept.mask, now.mask[:20])


def test_no_samples_no_rows(encoded: Dataset, config: TextConfig) -> None:
    assert len(TextCache.open(encoded, "held_out", config).rows([])) == 0


def test_only_real_tokens_are_kept_and_equal_captions_once(
    encoded: Dataset, encoder: TextEncoder, job: TextJob
) -> None:
    cache, told = job.cache(encoded, "train"), captions(encoded)
    for number in range(len(cache.shards)):
        different = {told[index] for index in cache.shards[number].samples}
        assert len(different) < cache.shards[number].count
        assert cache.find(number).rows == sum(min(12, encoder.count_tokens(caption)) for caption in different)


def test_the_files_are_plain_safetensors(encoded: Dataset, job: TextJob) -> None:
    cache = job.cache(encoded, "train")
    shard = cache.shards[0]
    with safe_open(cache.place.path / cache.name(0), "pt") as file:
        assert set(file.keys()) == {"spans", "values"}
        assert file.get_tensor("spans").shape == (shard.count, 2)
        first, count = file.get_tensor("spans")[3].tolist()
        row = TextCache(cache, 12).rows([3]).tokens[0, :count]
        assert torch.equal(file.get_tensor("values")[first : first + count], row)
        assert file.metadata()["image_shard"] == shard.name
        assert file.metadata()["image_shard_sha256"] == encoded.manifest.files[shard.name].sha256
    assert '"max_tokens": 12' in (cache.place.path / ABOUT).read_text()


@pytest.mark.parametrize(("dtype", "relative"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_half_as_wide_states_are_the_rounded_ones(
    data: Dataset, config: TextConfig, dtype: str, relative: float
) -> None:
    half = TextConfig.model_validate({**config.model_dump(), "dtype": dtype})
    encode_data(data, TextJob(half))
    exact, rounded = (TextCache.open(data, "held_out", each).rows(range(5)).tokens for each in (config, half))
    assert not torch.equal(exact, rounded)
    assert bool(((exact - rounded).abs() <= exact.abs() * relative + 2**-24).all())


def test_everything_that_changes_the_states_changes_the_key(
    encoded: Dataset, tmp_path: Path, config: TextConfig
) -> None:
    copy, edited = tmp_path / "copy", tmp_path / "edited"
    shutil.copytree(config.encoder, copy)
    shutil.copytree(config.encoder, edited)
    weights = next(edited.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    def place(**changes: Any) -> Path:
        return folder(encoded, TextJob(config.model_copy(update=changes)))

    places = [place(), place(max_tokens=13), place(dtype="bf16"), place(encoder=str(edited))]
    assert len(set(places)) == 4
    assert place(encoder=str(copy)) == places[0], "a copy of the encoder is the same one, wherever it lies"
    assert {each.parent for each in places} == {Path(encoded.path) / "encoded"}


def test_what_is_whole_is_not_made_again(data: Dataset, job: TextJob) -> None:
    before = files(data, job)
    assert encode_data(data, job, thorough=True).made == 0
    assert not any(ensure(data, "train", job))
    assert files(data, job) == before


def test_ranks_share_the_shards(data: Dataset, job: TextJob) -> None:
    shutil.rmtree(Path(data.path) / "encoded")
    shards = len(data.split("train").shards)
    made = [sum(ensure(data, "train", job, part=rank, parts=2)) for rank in range(2)]
    assert sum(made) == shards
    assert min(made) >= shards // 2
    assert not any(ensure(data, "train", job))


def test_damage_is_found_and_mended(data: Dataset, job: TextJob) -> None:
    cache = job.cache(data, "train")
    before, path = files(data, job), cache.place.path / cache.name(1)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 0x10
    for wrong, thorough in [(whole[:-1], False), (whole[:100], False), (b"", False), (bytes(flipped), True)]:
        path.write_bytes(wrong)
        assert encode_data(data, job, thorough=thorough).made == 1
        assert path.read_bytes() == whole
    assert {name for name in before if files(data, job)[name] != before[name]} == {cache.name(1)}


def test_a_missing_file_is_told_to_a_reader(data: Dataset, job: TextJob, config: TextConfig) -> None:
    cache = job.cache(data, "train")
    (cache.place.path / cache.name(0)).unlink()
    with pytest.raises(StorageError) as caught:
        TextCache.open(data, "train", config).rows([0])
    text = str(caught.value)
    assert "An encoded shard cannot be read." in text
    assert f"value:   '{cache.place.path / cache.name(0)}'" in text
    assert "darkroom data encode" in text


def test_a_shard_that_was_rewritten_is_encoded_again_and_no_other(data: Dataset, job: TextJob) -> None:
    cache, before = job.cache(data, "train"), files(data, job)
    shutil.copy(cache.place.path / cache.name(0), cache.place.path / "train-999999.safetensors")
    name = cache.shards[1].name
    data.manifest.files[name] = data.manifest.files[name].model_copy(update={"sha256": "0" * 64})
    done = encode_data(data, job)
    assert (done.made, done.removed) == (1, 1)
    assert set(files(data, job)) == set(before), "the file of a shard that is gone went with it"
    assert {each for each in before if files(data, job)[each] != before[each]} == {cache.name(1)}


def test_what_is_forgotten_is_forgotten_here_too(data: Dataset, job: TextJob, config: TextConfig) -> None:
    """The file of the shard that held it goes with it; the others stay as they are."""
    before, count = files(data, job), len(data.split("train"))
    picture = hashlib.sha256(data.split("train").encoded(0)).hexdigest()
    forget(data.path, [OptOut(selector="hash", value=picture, when="2026-01-01")])
    left = Dataset.open(data.path)
    assert before.items() > files(left, job).items()
    assert len(files(left, job)) == len(before) - 1
    with pytest.raises(StorageError, match="An encoded shard cannot be read"):
        TextCache.open(left, "train", config).rows(range(len(left.split("train"))))
    assert encode_data(left, job).made == 1
    again = TextJob(config.model_copy(update={"dtype": "bf16"}))
    encode_data(left, again)
    cache, told = TextCache.open(left, "train", config), captions(left)
    assert len(told) == count - 1
    anew = TextCache.open(left, "train", again.config)
    assert torch.allclose(cache.rows(range(len(told))).tokens, anew.rows(range(len(told))).tokens, rtol=2**-7)


def test_whoever_finds_all_states_does_not_load_the_encoder(encoded: Dataset, config: TextConfig) -> None:
    code = f"""
import sys
from training.conditioning_config import TextConfig
from training.data.dataset import Dataset
from training.data.encode import ensure
from training.data.encoded.text import TextCache, TextJob
config = TextConfig.model_validate({config.model_dump()!r})
dataset = Dataset.open({str(encoded.path)!r})
assert not any(ensure(dataset, "train", TextJob(config)))
assert len(TextCache.open(dataset, "train", config).rows([0, 7])) == 2
sys.exit("transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_caption_that_cannot_be_read_counts_as_empty(
    data: Dataset, encoder: TextEncoder, job: TextJob, config: TextConfig
) -> None:
    split = data.split("train")
    record = split.records[4]
    with (Path(data.path) / split.shards[int(record["shard"])]).open("r+b") as file:
        file.seek(int(record["json_offset"]))
        file.write(b"\xff" * int(record["json_size"]))
    shutil.rmtree(folder(data, job))
    assert encode_data(data, job).unreadable == 1
    rows = TextCache.open(data, "train", config).rows([4])
    assert torch.allclose(rows.tokens[0], encoder.encode([""]).tokens[0], atol=1e-6)


def test_processes_keep_what_one_process_keeps(data: Dataset, job: TextJob, config: TextConfig) -> None:
    alone = TextCache.open(data, "train", config).rows(range(50))
    shutil.rmtree(folder(data, job))
    told: list[tuple[int, int]] = []
    done = encode_data(data, job, executor=LocalExecutor(2), progress=lambda *step: told.append(step))
    assert done.made == done.shards
    assert told[0] == (0, PICTURES)
    assert told[-1] == (PICTURES, PICTURES)
    together = TextCache.open(data, "train", config).rows(range(50))
    assert torch.allclose(alone.tokens, together.tokens, atol=1e-6)
    assert torch.equal(alone.mask, together.mask)


def test_a_data_set_behind_a_network_keeps_them_beside_its_images_for_every_machine(
    encoded: Dataset, job: TextJob, config: TextConfig, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Folder.at(bucket)
    for name in [*encoded.manifest.files, MANIFEST]:
        remote.upload(Path(encoded.path) / name, name)
    expected = TextCache.open(encoded, "train", config).rows(range(50))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    dataset = Dataset.open(bucket)
    done = encode_data(dataset, job, share=True)
    assert done.made == done.shards
    assert folder(dataset, job).is_relative_to(tmp_path / "one")
    # another machine: nothing is encoded there, not even where a fetched file was damaged on its way
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    elsewhere = Dataset.open(bucket)
    for _ in range(2):
        assert not any(ensure(elsewhere, "train", job))
        assert torch.equal(TextCache.open(elsewhere, "train", config).rows(range(50)).tokens, expected.tokens)
        fetched = folder(elsewhere, job) / job.cache(elsewhere, "train").name(1)
        fetched.write_bytes(fetched.read_bytes()[:-1])
