"""What a job is told: the command of this call, as it means the same on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import jobs
from cluster.cli import app
from training.conditioning_config import TextConfig
from training.config import load_recipe

ADDRESS = "http://head:8265"
Sent = dict[str, Any]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sent:
    """What would have been submitted; the current directory has a folder named like a sub-command."""
    caught: Sent = {}

    def run_remotely(address: str, words: list[str], session: Any, **more: Any) -> int:
        caught.update(address=address, words=words, home=session.home, **more)
        return 0

    monkeypatch.setattr(jobs, "run_remotely", run_remotely)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "pictures").mkdir()
    return caught


def call(*words: str) -> None:
    """The command line, within this process, whose own words are others."""
    app([*words], standalone_mode=False, obj=[])


def recipe(sent: Sent) -> dict[str, Any]:
    text: str = sent["files"][jobs.RECIPE]
    return dict(yaml.safe_load(text))


def test_a_folder_named_like_a_command(sent: Sent, tmp_path: Path) -> None:
    call("data", "build", "pictures", "data", "--held-out", "0.2", "--force", "--address", ADDRESS)
    assert sent["words"] == [
        *("data", "build", "--force", "--held-out=0.2", "--"),
        *(str(tmp_path / "pictures"), str(tmp_path / "data")),
    ]


@pytest.mark.parametrize("given", [["--data", "data/cats"], ["--data=./data/cats"], ["--set", "data.path=data/cats"]])
def test_the_data_s_path_is_absolute_however_it_is_written(sent: Sent, tmp_path: Path, given: list[str]) -> None:
    call("--home", "foo", "train", "base", *given, "--json", f"--address={ADDRESS}", "--tracking-uri", "http://m:1")
    assert sent["words"] == ["train", "--json", "--", jobs.RECIPE]
    assert sent["tracking_uri"] == "http://m:1"
    assert recipe(sent)["data"]["path"] == str(tmp_path / "data" / "cats")


def test_the_recipe_travels_resolved(sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bases, its overrides and its place outside of the current directory."""
    (tmp_path / "other.yaml").write_text(
        "base: base\nsteps: 77\nconditioning: {kind: text, encoder: models/mine}\ncheckpoint: {path: kept}\n"
    )
    (tmp_path / "mine.yaml").write_text(f"base: {tmp_path}/other.yaml\nname: mine\n")
    monkeypatch.chdir(tmp_path / "data")
    call("train", str(tmp_path / "mine.yaml"), "--set", "optimizer.learning_rate=1e-5", "--address", ADDRESS)
    written = tmp_path / "there" / jobs.RECIPE
    written.parent.mkdir()
    written.write_text(sent["files"][jobs.RECIPE])
    there = load_recipe(str(written))
    assert (there.name, there.steps, there.optimizer.learning_rate) == ("mine", 77, 1e-5)
    assert isinstance(there.conditioning, TextConfig)
    assert there.conditioning.encoder == str(tmp_path / "data" / "models" / "mine")
    assert there.checkpoint.path == str(tmp_path / "data" / "kept")


def test_a_sweep_s_words(sent: Sent, tmp_path: Path) -> None:
    search = "optimizer.learning_rate=loguniform(1e-4, 1e-2)"
    call("sweep", "smileys", "--data", "data", "--search", search, "--trials", "3", "--address", ADDRESS)
    assert sent["words"] == ["sweep", f"--search={search}", "--trials=3", "--", jobs.RECIPE]
    assert recipe(sent)["data"]["path"] == str(tmp_path / "data")


def test_a_demo_s_words(sent: Sent, tmp_path: Path) -> None:
    call("--home", "home", "demo", "pictures", "--set", "steps=9", "--images", "16", "--address", ADDRESS)
    data = tmp_path / "home" / "data" / "pictures"
    assert sent["words"] == [
        *("demo", f"--recipe={jobs.RECIPE}", '--set=name="pictures"', f'--set=data.path="{data}"', "--images=16"),
        *("--", str(tmp_path / "pictures")),
    ]
    assert (recipe(sent)["steps"], recipe(sent)["name"], recipe(sent)["data"]["path"]) == (9, "pictures", str(data))
    assert sent["home"] == tmp_path / "home"


def test_a_bundle_s_folder_and_a_model_s_name(sent: Sent, tmp_path: Path) -> None:
    (tmp_path / "path" / "bundle").mkdir(parents=True)
    call("serve", "path/bundle", "--port", "8000", "--address", ADDRESS)
    assert sent["words"] == ["serve", "--port=8000", "--", str(tmp_path / "path" / "bundle")]
    call("serve", "cats@champion", "--down", "--address", ADDRESS)
    assert sent["words"] == ["serve", "--down", "--", "cats@champion"]
