"""``darkroom data`` as a user types it."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.commands.data import app
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
        ("--held-out", "1.5", "--held-out is not valid"),
        ("--background", "transparentish", "unknown color specifier"),
        ("--min-side", "0", "--min-side is not valid"),
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
