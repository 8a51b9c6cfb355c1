"""Sources of every kind become data sets: round trips, sums, determinism, and what is found when run again."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import training.data
from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.clean import CleanConfig
from training.data.clean.duplicates import DuplicatesConfig
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.executor import LocalExecutor
from training.data.manifest import check_files, read_manifest
from training.data.planning import split_of
from training.data.progress import Step
from training.data.storage import Folder
from training.data.workspace import opened
from training.errors import DataError, UsageError

DEMO = Path(training.data.__file__).parent / "demo" / "smileys.tar"

KEEP_COPIES = CleanConfig(duplicates=DuplicatesConfig(exact=False, near=False))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_picture_comes_back_byte_for_byte_with_its_fields(pictures: Path, built: Path) -> None:
    dataset = Dataset.open(built)
    found = {}
    for name in ("train", "held_out"):
        split = dataset.split(name)
        for index, sample in enumerate(split):
            assert sample.index == index
            assert sample.image.shape == (24, 24, 3)
            assert sample.caption == split.caption(index)
            found[sample.key.split("-", 1)[1]] = (split.encoded(index), sample.caption, sample.metadata)
    assert len(found) == 40
    for picture in sorted(pictures.iterdir()):
        if picture.suffix in {".png", ".jpg", ".webp"}:
            data, caption, metadata = found[picture.stem]
            assert data == picture.read_bytes()
            assert caption == f"number {int(picture.stem[1:])}"
            assert metadata.get("licence") == (None if int(picture.stem[1:]) % 2 else "MIT")


def test_totals_add_up(built: Path) -> None:
    manifest = read_manifest(built)
    ledger = list(read_ledger(built))
    assert manifest.inputs == len(ledger) == manifest.kept + sum(manifest.dropped.values())
    assert manifest.kept == sum(split.count for split in manifest.splits.values()) == sum(manifest.licences.values())
    assert manifest.licences == {"MIT": 20, "unstated": 20}
    for name, split in manifest.splits.items():
        assert Counter(row.split for row in ledger)[name] == split.count > 0
    check_files(built, manifest, checksums=True)


def test_the_ledger_says_where_each_picture_lies(built: Path) -> None:
    for row in read_ledger(built):
        assert row.kept
        assert row.shard is not None
        assert row.offset is not None
        shard = (built / row.shard).read_bytes()
        header = shard[row.offset - 512 : row.offset]
        assert header.startswith(str(row.key).encode())
        size = int(header[124:135], 8)
        assert hashlib.sha256(shard[row.offset : row.offset + size]).hexdigest() == row.sha256


def test_a_second_build_gives_the_same_bytes(pictures: Path, built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(pictures, copy)
    build(copy, tmp_path / "again", BuildConfig(held_out=0.2))
    for path in built.iterdir():
        if path.name != "origin.json":  # says where this source lay; no part of the data set
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_shards_are_split_by_size_and_the_index_follows(encode: Callable[..., bytes], tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.png").write_bytes(encode(number, size=(320, 320)))  # noise: about 300 kB each
    manifest = build(source, tmp_path / "out", BuildConfig(held_out=0, shard_mb=1))
    assert len(manifest.splits["train"].shards) == 3
    assert all((tmp_path / "out" / name).stat().st_size <= 1_010_000 for name in manifest.splits["train"].shards)
    split = Dataset.open(tmp_path / "out").split("train")
    assert [split.encoded(n) for n in range(8)] == [(source / f"{n}.png").read_bytes() for n in range(8)]
    held_out = Dataset.open(tmp_path / "out").split("held_out")
    assert len(held_out) == 0
    assert list(held_out) == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the reader leaves its own files open
def test_webdatasets_own_reader_reads_the_shards(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset
    import webdataset.utils

    monkeypatch.setattr(webdataset.utils, "enforce_security", True)
    urls = [str(built / name) for name in read_manifest(built).splits["train"].shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    split = Dataset.open(built).split("train")
    assert len(samples) == len(split)
    for index, sample in enumerate(samples):
        assert sample["__key__"] == split.key(index)
        ending = next(name for name in sample if name in {"png", "jpg", "webp"})
        assert sample[ending] == split.encoded(index)
        assert json.loads(sample["json"])["caption"] == split.caption(index)


def test_the_demo_pictures(tmp_path: Path) -> None:
    manifest = build(DEMO, tmp_path / "smileys", BuildConfig())
    assert DEMO.stat().st_size < 2_000_000
    assert (manifest.inputs, manifest.kept, manifest.dropped) == (335, 335, {})
    assert manifest.licences == {"Apache-2.0": 169, "MIT": 166}
    sample = Dataset.open(tmp_path / "smileys").split("train")[0]
    assert sample.metadata["category"] == "Smileys & Emotion"
    assert sample.image[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_manifest_is_a_source(ending: str, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "listed"
    shutil.copytree(pictures, folder)
    names = ["p03.png", "./p00.png", "p01.jpg"]
    rows = [{"file_name": name, "text": f"picture {number}"} for number, name in enumerate(names)]
    if ending == "csv":
        text = "file_name,text\n" + "".join(f"{row['file_name']},{row['text']}\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"list.{ending}").write_text(text)
    manifest = build(folder / f"list.{ending}", tmp_path / "out", BuildConfig(held_out=0))
    assert (manifest.inputs, manifest.kept) == (3, 3)
    split = Dataset.open(tmp_path / "out").split("train")
    assert [split.caption(n) for n in range(3)] == ["picture 0", "picture 1", "picture 2"]


def test_a_folder_may_bring_its_own_manifest(encode: Callable[..., bytes], tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    (source / "images" / "a.png").write_bytes(encode(1))
    (source / "b.png").write_bytes(encode(2))
    rows = [{"file": "images/a.png", "caption": "from the manifest", "licence": "CC0"}, {"file": "gone.png"}]
    (source / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n")
    manifest = build(source, tmp_path / "out", BuildConfig(held_out=0))
    assert manifest.dropped == {"bad_row": 1, "missing_file": 1}
    split = Dataset.open(tmp_path / "out").split("train")
    assert [split.caption(n) for n in range(len(split))] == ["", "from the manifest"]


def test_copies_of_a_picture_share_a_split(encode: Callable[..., bytes], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(60):
        (source / f"{number:02d}.png").write_bytes(encode(number % 20))
    build(source, tmp_path / "out", BuildConfig(held_out=0.5, clean=KEEP_COPIES))
    places: dict[str, set[str | None]] = {}
    for row in read_ledger(tmp_path / "out"):
        places.setdefault(row.sha256, set()).add(row.split)
    assert len(places) == 20
    assert all(len(splits) == 1 for splits in places.values())


@given(st.binary(min_size=32, max_size=32), st.floats(0, 0.999), st.floats(0, 0.999))
def test_holding_out_more_never_moves_a_picture_back(digest: bytes, one: float, other: float) -> None:
    fewer, more = sorted([one, other])
    assert split_of(digest, fewer) == "train" or split_of(digest, more) == "held_out"
    assert split_of(digest, 0.0) == "train"


def test_the_same_command_again_finds_the_result(pictures: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(pictures, source)
    first = build(source, out, BuildConfig())
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build(source, out, BuildConfig()) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    os.utime(source / "p00.png", (1, 1))  # touched, not changed: the pictures' own bytes decide
    (out / "origin.json").write_text("[]")
    assert build(source, out, BuildConfig()) == first
    assert (out / "manifest.json").stat().st_mtime_ns == stamps["manifest.json"]


def test_another_source_or_config_needs_force(pictures: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(pictures, source)
    first = build(source, out, BuildConfig())
    with pytest.raises(DataError, match="built from another configuration") as refused:
        build(source, out, BuildConfig(held_out=0.3))
    assert "--force replaces it" in str(refused.value)
    (source / "p00.json").write_text('{"caption": "another caption"}')
    with pytest.raises(DataError, match="built from other pictures"):
        build(source, out, BuildConfig())
    assert read_manifest(out) == first
    assert build(source, out, BuildConfig(), force=True).hash != first.hash
    assert _names(tmp_path) == {"source", "out"}


def test_a_damaged_result_is_named_and_can_be_replaced(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = build(pictures, out, BuildConfig())
    check_files(out, first, checksums=True)
    os.truncate(out / "train-000000.tar", 1000)
    with pytest.raises(DataError, match=r"train-000000\.tar has 1000 bytes, not"):
        build(pictures, out, BuildConfig())
    assert build(pictures, out, BuildConfig(), force=True) == first


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_data_set_is_left_alone(force: bool, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not a data set; it is left alone"):
        build(pictures, tmp_path, BuildConfig(), force=force)
    assert _names(tmp_path) == {"thesis.txt"}


def test_a_data_set_cannot_lie_in_its_source(pictures: Path) -> None:
    for out in (pictures, pictures / "out", pictures.parent):
        with pytest.raises(UsageError, match="cannot lie inside its source"):
            build(pictures, out, BuildConfig())


def test_missing_empty_and_foreign_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as missing:
        build(tmp_path / "nowhere", tmp_path / "out", BuildConfig())
    assert "a .jsonl, .csv or .parquet manifest" in str(missing.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        build(tmp_path / "empty", tmp_path / "out", BuildConfig())
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    with pytest.raises(DataError, match="holds no pictures"):
        build(tmp_path / "empty.tar", tmp_path / "out", BuildConfig())
    (tmp_path / "pictures.zip").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(DataError, match="not a readable tar"):
        build(tmp_path / "pictures.zip", tmp_path / "out", BuildConfig())
    with pytest.raises(DataError, match="cannot be read") as refused:
        build(tmp_path / ("x" * 300), tmp_path / "out", BuildConfig())
    assert "File name too long" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_one_good_picture_fails_on_one_screen(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(30):
        (source / f"{number:02d}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="None of the 30 inputs could be kept") as refused:
        build(source, tmp_path / "out", BuildConfig())
    text = str(refused.value)
    assert "dropped were 30 undecodable" in text
    assert "00.png: undecodable" in text
    assert len(text.splitlines()) < 20
    assert _names(tmp_path) == {"source"}


def test_nothing_to_train_on_is_an_error(encode: Callable[..., bytes], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    number = next(n for n in range(99) if split_of(hashlib.sha256(encode(n)).digest(), 0.5) == "held_out")
    (source / "one.png").write_bytes(encode(number))
    with pytest.raises(DataError, match="none is left to train on"):
        build(source, tmp_path / "out", BuildConfig(held_out=0.5))


def test_an_interrupted_build_goes_on_and_another_request_starts_anew(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out[1]"

    def interrupt(step: Step) -> None:
        if step.stage == "judge" and step.done == 20:
            raise KeyboardInterrupt

    inline = LocalExecutor(1)
    with pytest.raises(KeyboardInterrupt):
        build(pictures, out, BuildConfig(), interrupt, executor=inline, block_inputs=10)
    assert _names(tmp_path) == {"out[1].building"}
    steps: list[Step] = []
    build(pictures, out, BuildConfig(), steps.append, executor=inline, block_inputs=10)
    assert next(step for step in reversed(steps) if step.stage == "judge") == Step("judge", 40, 40, found=20)
    assert _names(tmp_path) == {"out[1]"}
    with pytest.raises(KeyboardInterrupt):
        build(pictures, out, BuildConfig(held_out=0.3), interrupt, executor=inline, block_inputs=10, force=True)
    steps.clear()
    build(pictures, out, BuildConfig(held_out=0.4), steps.append, executor=inline, block_inputs=10, force=True)
    assert all(step.found == 0 for step in steps)
    assert _names(tmp_path) == {"out[1]"}


def test_two_builds_of_one_data_set_do_not_meet(pictures: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def meet(step: Step) -> None:
        if step.stage == "decide":
            with pytest.raises(DataError, match="Another build of the same data set is running") as error:
                build(pictures, tmp_path / "out", BuildConfig())
            refused.append(str(error.value))

    build(pictures, tmp_path / "out", BuildConfig(), meet)
    assert len(refused) == 1
    assert _names(tmp_path) == {"out"}


def test_a_strange_folder_in_the_place_of_unfinished_work_is_left_alone(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out.building").mkdir()
    (tmp_path / "out.building" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds something else; it is left alone"):
        build(pictures, tmp_path / "out", BuildConfig())
    assert _names(tmp_path / "out.building") == {"thesis.txt"}


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of temporary files is everybody's, and the lock's name can be guessed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = Folder.at("memory://bucket/out")
    (tmp_path / "precious").write_text("kept")
    with opened(out):
        (lock,) = tmp_path.glob("darkroom-*.lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), opened(out):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_progress_counts_every_input(pictures: Path, tmp_path: Path) -> None:
    seen: list[Step] = []
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(pictures, source)
    (source / "p00.png").write_bytes(b"no picture")
    build(source, out, BuildConfig(held_out=0), seen.append, executor=LocalExecutor(1), block_inputs=15)
    judged = [(step.done, step.total, step.dropped) for step in seen if step.stage == "judge"]
    assert judged == [(0, 40, 0), (15, 40, 1), (30, 40, 1), (40, 40, 1)]
    assert seen[-1] == Step("write", 39, 39, dropped=1)
    seen.clear()
    os.utime(source / "p00.png", (1, 1))  # all pictures are read again, to compare them
    build(source, out, BuildConfig(held_out=0), seen.append)
    assert seen == [Step("compare", done, 40) for done in range(1, 41)]


def test_an_edited_manifest_or_index_is_refused(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"background": "#ffffff"', '"background": "#000000"'))
    with pytest.raises(DataError, match="manifest was changed") as refused:
        Dataset.open(copy)
    assert f"darkroom data build SOURCE {copy} --force" in str(refused.value)
    (copy / "manifest.json").write_text(text.replace('"schema_version": 2', '"schema_version": 1'))
    with pytest.raises(DataError, match="schema version 2"):
        Dataset.open(copy)
    with pytest.raises(DataError, match="There is no data set"):
        Dataset.open(tmp_path)
    (copy / "manifest.json").write_text(text)
    index = copy / "train.index.npy"
    np.save(index, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):  # an index with a pickle in it is not opened
        Dataset(copy, read_manifest(copy)).split("train")


def test_an_unknown_split_is_refused(built: Path) -> None:
    with pytest.raises(UsageError, match="options: train, held_out"):
        Dataset.open(built).split("test")  # type: ignore[arg-type]
