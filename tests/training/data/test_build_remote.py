"""A data set is built in a bucket of a real S3 server: visible by its manifest, resumed, replaced, forgotten."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.executor import LocalExecutor
from training.data.forget import forget
from training.data.forgotten import OptOut
from training.data.manifest import check_files, read_manifest
from training.data.normalise import JpegStore
from training.data.progress import Step
from training.data.storage import Folder
from training.errors import DataError, StorageError

Encode = Callable[..., bytes]
CONFIG = BuildConfig(held_out=0.3, shard_mb=1)
NOT_COMPARED = {"origin.json"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """Twelve pictures of 0.2 MB."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(12):
        (folder / f"{number:02d}.png").write_bytes(encode(number, size=(256, 256)))
        (folder / f"{number:02d}.json").write_text(
            json.dumps({"caption": f"{number}", "creator": f"person {number % 3}"})
        )
    return folder


def _files(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.names() if name not in NOT_COMPARED}


def test_a_bucket_gets_the_same_bytes_and_an_interrupted_build_goes_on(
    source: Path, bucket: str, tmp_path: Path
) -> None:
    out = Folder.at(f"{bucket}/out")

    def interrupt(step: Step) -> None:
        if step.stage == "write":
            assert not out.exists("manifest.json")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(str(source), out.place, CONFIG, interrupt, executor=LocalExecutor(1), block_inputs=5)
    with pytest.raises(DataError, match="There is no data set"):
        read_manifest(out)
    steps: list[Step] = []
    made = build(str(source), out.place, CONFIG, steps.append, block_inputs=5)
    assert max(step.found for step in steps) == 12
    build(source, tmp_path / "local", CONFIG)
    assert _files(out) == _files(Folder.at(tmp_path / "local"))
    assert not list(Folder.at(f"{bucket}/out.building").names())
    check_files(out, made, checksums=True)
    assert [row.source for row in read_ledger(out)] == [f"{number:02d}.png" for number in range(12)]
    assert Dataset.open(out.place).split("train").caption(0) == Dataset.open(tmp_path / "local").split("train").caption(
        0
    )
    assert build(str(source), out.place, CONFIG) == made


def test_a_bucket_is_a_source_and_is_read_once_more(source: Path, bucket: str, tmp_path: Path) -> None:
    place = Folder.at(f"{bucket}/source")
    for path in sorted(source.iterdir()):
        place.upload(path, path.name)
    far = build(place.place, f"{bucket}/out", CONFIG, block_inputs=5)
    near = build(source, tmp_path / "local", CONFIG)
    assert far.hash == near.hash
    assert far.source_digest == near.source_digest


def test_the_old_data_set_is_read_until_the_new_one_is_there(source: Path, bucket: str) -> None:
    out = Folder.at(f"{bucket}/out")
    old = build(str(source), out.place, CONFIG)

    def look(step: Step) -> None:
        check_files(out, read_manifest(out), checksums=True)
        assert read_manifest(out) == old

    other = CONFIG.model_copy(update={"held_out": 0.5})
    new = build(str(source), out.place, other, look, force=True, executor=LocalExecutor(1))
    assert (new.generation, new.kept) == (1, 12)
    assert set(out.names()) == {*new.files, "manifest.json", "origin.json"}
    check_files(out, new, checksums=True)
    assert Dataset.open(out.place).hash == new.hash


def test_samples_are_forgotten_in_a_bucket(source: Path, bucket: str) -> None:
    out = Folder.at(f"{bucket}/out")
    build(str(source), out.place, CONFIG)
    done = forget(out.place, [OptOut(selector="creator", value="person 1", when="2026-01-02")])
    assert done.samples == 4
    assert set(out.names()) == {*done.manifest.files, "manifest.json", "origin.json", "forgotten.json"}
    check_files(out, done.manifest, checksums=True)
    assert [row.number for row in read_ledger(out) if row.rule == "forgotten"] == [1, 4, 7, 10]
    again = build(str(source), out.place, CONFIG.model_copy(update={"held_out": 0.5}), force=True)
    assert again.dropped == {"forgotten": 4}


def test_a_bucket_that_vanishes_is_a_clear_error_and_the_same_command_goes_on(
    source: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Folder.at(f"{bucket}/out")
    config = CONFIG.model_copy(update={"store": JpegStore(quality=80)})

    def vanish(step: Step) -> None:
        if step.stage == "judge" and step.done == 5:
            patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there

    with monkeypatch.context() as patch, pytest.raises(StorageError) as refused:
        build(str(source), out.place, config, vanish, executor=LocalExecutor(1), block_inputs=5)
    assert bucket in str(refused.value)
    assert "good-secret" not in str(refused.value)
    steps: list[Step] = []
    build(str(source), out.place, config, steps.append, block_inputs=5)
    assert max(step.found for step in steps) == 5
    build(source, tmp_path / "local", config)
    assert _files(out) == _files(Folder.at(tmp_path / "local"))


def test_what_is_not_a_data_set_in_a_bucket_is_left_alone(source: Path, bucket: str) -> None:
    out = Folder.at(f"{bucket}/out")
    out.write("thesis.txt", b"years of work")
    with pytest.raises(DataError, match="not a data set; it is left alone"):
        build(str(source), out.place, CONFIG, force=True)
    assert list(out.names()) == ["thesis.txt"]
