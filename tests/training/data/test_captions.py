"""Captions arrive from sidecars and manifests, and none is lost without a line in the ledger."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.manifest import Manifest
from training.data.rows import rows
from training.errors import DataError

Encode = Callable[..., bytes]


@pytest.fixture
def source(encode: Encode, tmp_path: Path) -> Path:
    """A folder with one picture."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "0.png").write_bytes(encode(0))
    return folder


def _built(source: Path, tmp_path: Path) -> tuple[Manifest, list[str]]:
    out = tmp_path / f"out of {source.name}"
    manifest = build(source, out, BuildConfig(held_out=0))
    split = Dataset.open(out).split("train")
    return manifest, [split.caption(index) for index in range(len(split))]


def test_five_rows_for_a_picture_are_five_samples_of_one_split(encode: Encode, source: Path, tmp_path: Path) -> None:
    (source / "1.png").write_bytes(encode(1))
    lines = [{"file": f"{number % 2}.png", "caption": f"caption {number}"} for number in range(10)]
    (source / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest, captions = _built(source, tmp_path)
    assert (manifest.inputs, manifest.kept, manifest.without_caption) == (10, 10, 0)
    assert captions == [f"caption {number}" for number in (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)]
    _, direct = _built(source / "captions.jsonl", tmp_path)
    assert direct == [f"caption {number}" for number in range(10)]
    build(source, tmp_path / "shared", BuildConfig(held_out=0.5))
    places: dict[str, set[str | None]] = {}
    for row in read_ledger(tmp_path / "shared"):
        places.setdefault(row.source, set()).add(row.split)
    assert [len(splits) for splits in places.values()] == [1, 1]


def test_of_two_manifests_the_second_ones_rows_are_refused_by_line(source: Path, tmp_path: Path) -> None:
    (source / "captions.jsonl").write_text('{"file": "0.png", "caption": "first"}\n')
    (source / "metadata.csv").write_text("file_name,caption\n0.png,second\n./0.png,third\n")
    manifest, captions = _built(source, tmp_path)
    assert captions == ["first"]
    assert manifest.dropped == {"duplicate_row": 2}
    ledger = {row.source: row.detail for row in read_ledger(tmp_path / "out of source")}
    assert ledger["metadata.csv:3"] == "another manifest names 0.png too"


def test_a_row_is_laid_over_the_sidecars(source: Path, tmp_path: Path) -> None:
    (source / "0.json").write_text('{"licence": "MIT", "width": 1, "prompt": "from the json"}')
    (source / "0.txt").write_text("from the text")
    (source / "metadata.csv").write_text("file_name,width\n0.png,24\n")
    _, captions = _built(source, tmp_path)
    assert captions == ["from the json"]
    fields = Dataset.open(tmp_path / "out of source").split("train").fields(0)
    assert (fields["licence"], fields["width"]) == ("MIT", "24")
    (source / "metadata.csv").write_text("file_name,caption\n0.png,from the row\n")
    build(source, tmp_path / "out", BuildConfig(held_out=0))
    assert Dataset.open(tmp_path / "out").split("train").caption(0) == "from the row"


def test_the_first_caption_that_is_not_empty_counts(source: Path, tmp_path: Path) -> None:
    (source / "list.csv").write_text('file_name, caption ,text\n0.png,,a cat\n0.png," ",\n0.png,a dog,a cat\n')
    manifest, captions = _built(source / "list.csv", tmp_path)
    assert captions == ["a cat", "", "a dog"]
    assert manifest.without_caption == 1


def test_the_count_of_missing_captions_does_not_name_the_data_set(source: Path, tmp_path: Path) -> None:
    (source / "0.txt").write_text("")
    manifest, _ = _built(source, tmp_path)
    assert manifest.without_caption == 1
    (source / "0.txt").unlink()
    (source / "0.json").write_text('{"caption": ""}')
    assert build(source, tmp_path / "other", BuildConfig(held_out=0)).hash == manifest.hash


def test_endings_in_capitals_are_endings(encode: Encode, tmp_path: Path) -> None:
    folder = tmp_path / "shouting"
    folder.mkdir()
    for name in ("A.JPG", "b.jpg", "C.JPG"):
        (folder / name).write_bytes(encode(ord(name[0]), kind="JPEG"))
    (folder / "A.TXT").write_text("a cat")
    (folder / "b.Json").write_text('{"caption": "a dog"}')
    (folder / "C.TXT").write_text("loud")
    (folder / "C.txt").write_text("low")
    manifest, captions = _built(folder, tmp_path)
    assert captions == ["a cat", "low", "a dog"]
    assert manifest.dropped == {"sidecar_without_image": 1}


def test_a_manifest_in_a_folder_names_pictures_from_there(encode: Encode, tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    (folder / "train" / "images").mkdir(parents=True)
    (folder / "notes").mkdir()
    (folder / "train" / "images" / "a.png").write_bytes(encode(1))
    (folder / "train" / "b.png").write_bytes(encode(2))
    (folder / "train" / "captions.jsonl").write_text('{"file": "images/a.png", "caption": "a"}\n')
    lines = ["../train/b.png", "../../outside.png", "/etc/passwd", "gone.png"]
    (folder / "notes" / "captions.jsonl").write_text(
        "".join(json.dumps({"file": line, "caption": "b"}) + "\n" for line in lines)
    )
    manifest, captions = _built(folder, tmp_path)
    assert captions == ["b", "a"]
    assert manifest.dropped == {"outside_source": 2, "missing_file": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_unicode_of_every_spelling_is_read(encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("e") else ""
    for name, text in (
        ("x.csv", "file,caption\na.png,Käfer 🐞\n"),
        ("x.jsonl", '{"file": "a.png", "text": "Käfer 🐞"}'),
    ):
        (row,) = rows(name, io.BytesIO((mark + text).encode(encoding)))
        assert (row.path, dict(row.fields or {})["caption"]) == ("a.png", "Käfer 🐞")


def test_a_row_that_is_not_utf8_is_named_and_the_others_are_kept() -> None:
    data = "file,caption\na.png,plain\nb.png,café\n".encode("latin-1") + "c.png,café\n".encode()
    found = list(rows("x.csv", io.BytesIO(data)))
    assert [(row.path, row.line) for row in found] == [("a.png", 2), ("", 3), ("c.png", 4)]
    assert found[1].finding is not None
    assert (found[1].finding.rule, found[1].finding.detail) == ("bad_row", "not UTF-8; save the file as UTF-8")
    assert dict(found[2].fields or {})["caption"] == "café"


@pytest.mark.parametrize(
    "data",
    [
        b'file,"caption"x\na.png,b\nc.png,d\n',
        b"file,l\xe9gende\na.png,b\n",
        b"\xff\xfe\x00\xd8\x00\xd8",
        b"\xff\xfef",
    ],
)
def test_a_csv_without_a_readable_header_is_one_error(data: bytes, source: Path, tmp_path: Path) -> None:
    (source / "captions.csv").write_bytes(data)
    with pytest.raises(DataError, match="manifest cannot be read") as refused:
        build(source, tmp_path / "out", BuildConfig(held_out=0))
    assert "captions.csv" in str(refused.value)
    assert "save it as UTF-8" in str(refused.value)
