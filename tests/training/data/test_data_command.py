"""``darkroom data`` as a user types it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.commands.data import app
from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Split
from training.errors import ConfigError, DataError

runner = CliRunner()


def test_build_and_show(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = runner.invoke(app, ["build", str(pictures), str(out), "--held-out", "0.2"])
    assert first.exit_code == 0, first.output
    assert "40 (40 kept, 0 dropped)" in first.output
    again = runner.invoke(app, ["build", str(pictures), str(out), "--held-out", "0.2"])
    assert "already the finished result" in again.output
    shown = runner.invoke(app, ["show", str(out), "--verify"])
    assert shown.exit_code == 0, shown.output
    assert f"Contact sheet: {out / 'contact_sheet.png'}" in shown.output
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 700


def test_json_is_json_and_the_whole_hash_is_shown(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answers = [json.loads(runner.invoke(app, ["build", str(pictures), str(out), "--json"]).stdout) for _ in range(2)]
    assert [answer["unchanged"] for answer in answers] == [False, True]
    assert answers[0]["manifest"] == answers[1]["manifest"]
    shown = json.loads(runner.invoke(app, ["show", str(out), "--json"]).stdout)
    assert shown["manifest"]["hash"] == answers[0]["manifest"]["hash"]
    assert Path(shown["contact_sheet"]).is_file()
    table = runner.invoke(app, ["show", str(out)]).output
    assert shown["manifest"]["hash"] in "".join(table.replace("\u2502", "").split())


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--held-out", "1.5", "held_out is not valid"),
        ("--background", "transparentish", "unknown color specifier"),
        ("--min-side", "0", "clean.size.min_side_px is not valid"),
        ("--max-pixels", "1000000000", "89478485"),
    ],
)
def test_options_out_of_range_are_usage_errors(
    option: str, value: str, text: str, pictures: Path, tmp_path: Path
) -> None:
    result = runner.invoke(app, ["build", str(pictures), str(tmp_path / "out"), option, value])
    assert isinstance(result.exception, ConfigError)
    assert text in str(result.exception)
    assert result.exception.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_errors_reach_the_front_door(tmp_path: Path) -> None:
    for arguments in (["show", str(tmp_path)], ["build", str(tmp_path / "no"), str(tmp_path / "out")]):
        result = runner.invoke(app, arguments)
        assert isinstance(result.exception, DataError)
        assert str(tmp_path) in str(result.exception)


def test_a_damaged_file_is_found_by_verify(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runner.invoke(app, ["build", str(pictures), str(out)])
    shard = out / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    result = runner.invoke(app, ["show", str(out), "--verify"])
    assert "train-000000.tar has another sha256" in str(result.exception)


@pytest.fixture
def damaged(pictures: Path, tmp_path: Path) -> Path:
    """A data set of which one picture cannot be read, though the files have their sizes."""
    out = tmp_path / "damaged"
    build(pictures, out, BuildConfig(held_out=0))
    row = next(row for row in read_ledger(out) if row.source == "p03.png")
    assert row.shard is not None
    assert row.offset is not None
    with (out / row.shard).open("r+b") as file:
        file.seek(row.offset)
        file.write(bytes(40))
    return out


def test_one_damaged_picture_hides_nothing_else(damaged: Path) -> None:
    result = runner.invoke(app, ["show", str(damaged)])
    assert "40 (40 kept, 0 dropped)" in result.output
    assert f"Contact sheet: {damaged / 'contact_sheet.png'}" in result.output
    assert isinstance(result.exception, DataError)
    assert "1 pictures of the data set cannot be read" in str(result.exception)
    assert "train[3]" in str(result.exception)
    assert (damaged / "contact_sheet.png").is_file()
    found = json.loads(runner.invoke(app, ["show", str(damaged), "--json"]).stdout)
    assert found["manifest"]["kept"] == 40
    assert found["contact_sheet"] == str(damaged / "contact_sheet.png")
    assert [text.split(":")[0] for text in found["unreadable"]] == ["train[3]"]


def test_a_data_set_that_cannot_be_written_is_shown(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Image.Image.save

    def save(self: Image.Image, path: Path, *words: str) -> None:  # tests may run as root, whom no mode keeps out
        if Path(path).parent == built:
            raise OSError(30, "Read-only file system")
        real(self, path, *words)

    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    result = runner.invoke(app, ["show", str(built)])
    assert result.exit_code == 0, result.output
    assert "40 (40 kept, 0 dropped)" in result.stdout
    assert "--sheet PATH" in result.stderr
    found = json.loads(runner.invoke(app, ["show", str(built), "--json"]).stdout)
    assert found["contact_sheet"] is None
    sheet = tmp_path / "no ending"
    assert runner.invoke(app, ["show", str(built), "--sheet", str(sheet)]).exit_code == 0
    with Image.open(sheet) as picture:
        assert picture.width > 700
    refused = runner.invoke(app, ["show", str(built), "--sheet", str(tmp_path / "no" / "where.png")])
    assert "40 (40 kept, 0 dropped)" in refused.stdout
    assert "No such file or directory" in str(refused.exception)


def test_full_size_pictures_are_not_collected_for_the_sheet(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def noted(images: list[Image.Image], captions: list[str], **_: int) -> Image.Image:
        seen.extend(image.size for image in images)
        return images[0]

    monkeypatch.setattr("training.evaluate.contact_sheet.contact_sheet", noted)
    monkeypatch.setattr(Split, "picture", lambda *_: (Image.new("RGB", (500, 300)), {"caption": ""}))
    assert runner.invoke(app, ["show", str(built), "--sheet", str(tmp_path / "sheet.png")]).exit_code == 0
    assert set(seen) == {(96, 58)}


def test_a_strangers_licence_is_neither_markup_nor_a_terminals_command(
    encode: Callable[..., bytes], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(encode(1))
    (source / "a.json").write_text(json.dumps({"licence": "see [/x] [red]MIT\x1b[31m\x9b"}))
    out = tmp_path / "out"
    for words in (["build", str(source), str(out), "--held-out", "0"], ["show", str(out)]):
        result = runner.invoke(app, words)
        assert result.exit_code == 0, result.output
        assert "see [/x] [red]MIT" in result.output
        assert "\x1b" not in result.output
        assert "\x9b" not in result.output


def test_a_build_says_how_many_have_no_caption(pictures: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(pictures, source)
    (source / "p01.txt").unlink()
    (source / "p03.txt").write_text(" ")
    result = runner.invoke(app, ["build", str(source), str(tmp_path / "out")])
    assert "without a caption" in result.output
    assert "2 of 40" in result.output


def test_names_that_the_system_refuses_are_errors_of_ours(pictures: Path, tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 300))
    for source, out in ((long, str(tmp_path / "out")), (str(pictures), long)):
        result = runner.invoke(app, ["build", source, out])
        assert isinstance(result.exception, DataError)
        assert "File name too long" in str(result.exception)
