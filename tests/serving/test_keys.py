"""API keys: a file with checksums, made and read by a command."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from serving.keys import KeyFile, Keys, Quota, new_key, read_keys, write_keys
from tests.serving.live_server import until
from training.errors import ConfigError, UsageError


def darkroom(home: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["--home", str(home), "keys", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_the_command_tells_a_secret_once_and_keeps_its_checksum(tmp_path: Path) -> None:
    secret = darkroom(tmp_path, "add", "studio", "--images-per-minute", "60", "--priority-ceiling", "2")
    path = tmp_path / "keys.json"
    assert secret.startswith("dr_")
    assert len(secret) > 40
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = Keys(path).find(secret)
    assert found is not None
    assert (found.name, found.quota, found.priority_ceiling) == ("studio", Quota(images_per_minute=60), 2)
    assert "studio" in darkroom(tmp_path, "list")
    assert "images per minute 60" in darkroom(tmp_path, "list")
    assert [each["name"] for each in json.loads(darkroom(tmp_path, "list", "--json"))] == ["studio"]
    darkroom(tmp_path, "remove", "studio")
    assert Keys(path).find(secret) is None


def test_a_key_that_is_there_or_is_not_there_is_said(tmp_path: Path) -> None:
    darkroom(tmp_path, "add", "studio")
    runner = CliRunner()
    with pytest.raises(UsageError, match="There is such a key already"):
        runner.invoke(app, ["--home", str(tmp_path), "keys", "add", "studio"], catch_exceptions=False)
    with pytest.raises(UsageError, match=r"There is no such key\.\n  value:   'other'\n  options: studio"):
        runner.invoke(app, ["--home", str(tmp_path), "keys", "remove", "other"], catch_exceptions=False)
    with pytest.raises(UsageError, match="cannot have this name"):
        new_key("../x", Quota(), 5)


def test_a_file_that_changes_is_read_again_and_a_damaged_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    (one, first), (other, second) = new_key("one", Quota(), 5), new_key("other", Quota(), 5)
    write_keys(path, KeyFile(keys=(one,)))
    keys = Keys(path)
    assert keys.find(first) == one
    assert keys.find(second) is None
    write_keys(path, KeyFile(keys=(other,)))
    until(lambda: keys.find(second) == other)
    assert keys.find(first) is None
    path.write_text("{")
    until(lambda: keys._looked_s and keys.find(second) == other)
    path.unlink()
    assert keys.find(second) == other


def test_a_file_that_is_not_there_or_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        Keys(path)
    assert f"darkroom keys add NAME --file {path}" in str(caught.value)
    path.write_text(json.dumps({"keys": [{"name": "x", "sha256": "secret!", "created_utc": ""}]}))
    with pytest.raises(ConfigError, match=r"keys\.0\.sha256") as caught:
        read_keys(path)
    assert "secret!" not in str(caught.value)
