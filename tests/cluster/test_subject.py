"""Whose pictures the demo shows, under which name and where, and what it says when they do not fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster import subject
from training.errors import DataError, UsageError

TINY = str(Path(__file__).resolve().parents[1] / "end_to_end" / "tiny.yaml")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("My pics", "My-pics"),
        ("a.b/pics.v2", "pics.v2"),
        ("pics.tar.gz", "pics"),
        ("captions.jsonl", "captions"),
        ("2024", "pictures-2024"),
        ("1e5", "pictures-1e5"),
        ("nan", "pictures-nan"),
        ("猫", "pictures"),
        ("x" * 200, "x" * 60),
    ],
)
def test_a_name_from_a_place(tmp_path: Path, place: str, name: str) -> None:
    folder = tmp_path / place
    if folder.suffix not in {".gz", ".jsonl"}:
        folder.mkdir(parents=True)
    assert subject.slug(folder) == name
    config = subject.recipe(tmp_path, folder, TINY, [])
    assert config.name == name


def test_the_current_folder_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path / "cats")
    config = subject.recipe(tmp_path / "home", Path(), TINY, [])
    assert (config.name, config.data.path) == ("cats", str(tmp_path / "home" / "data" / "cats"))


def test_pictures_of_one_s_own_share_nothing_with_the_packaged_ones(tmp_path: Path) -> None:
    packaged = subject.recipe(tmp_path, None, TINY, [])
    own = subject.recipe(tmp_path, tmp_path / "pics", TINY, [])
    named = subject.recipe(tmp_path, tmp_path / "pics", TINY, ["name=mine"])
    placed = subject.recipe(tmp_path, tmp_path / "pics", TINY, ["data.path=somewhere"])
    assert [(config.name, Path(config.data.path)) for config in (packaged, own, named, placed)] == [
        ("tiny", tmp_path / "data" / "smileys"),
        ("pics", tmp_path / "data" / "pics"),
        ("mine", tmp_path / "data" / "mine"),
        ("pics", Path.cwd() / "somewhere"),
    ]


def test_another_source_s_folder_offers_what_the_demo_has(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subject.build(pictures, out)
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(pictures.iterdir())[:8]:
        os.link(path, other / path.name)
    with pytest.raises(DataError) as caught:
        subject.build(other, out)
    text = caught.value.as_text()
    assert "options: --set name=OTHER, --set data.path=FOLDER" in text
    assert f"darkroom data build {other} {out} --force replaces it" in text
    assert "another OUT" not in text


def test_a_folder_inside_its_source(pictures: Path) -> None:
    with pytest.raises(UsageError) as caught:
        subject.build(pictures, pictures / ".darkroom" / "data")
    assert "--set data.path=FOLDER" in caught.value.as_text()
    assert "--force" not in caught.value.as_text()


def test_options_of_another_command_are_not_offered(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="None of the 1 inputs") as caught:
        subject.build(tmp_path / "pictures", tmp_path / "out")
    assert "--min-side" not in caught.value.as_text()
    assert "darkroom data build" in caught.value.as_text()
