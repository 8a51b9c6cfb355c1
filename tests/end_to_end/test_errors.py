"""Bad input: one screen with value, rule and options; 2 for usage, 1 for failure; nothing left behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.stack import Stack
from training.data.build import build
from training.data.config import BuildConfig

TINY = Path(__file__).parent / "tiny.yaml"
Darkroom = Callable[..., "subprocess.CompletedProcess[str]"]


def refused(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    text = done.stderr
    assert done.returncode == code, text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 24, text
    for part in parts:
        assert part in text, text


def test_unknown_recipe(darkroom: Darkroom) -> None:
    refused(darkroom("train", "nothing"), 2, "no such recipe", "'nothing'", "smileys")


def test_unknown_recipe_key(darkroom: Darkroom) -> None:
    done = darkroom("train", TINY, "--set", "optimizer.learning_rat=1e-3")
    refused(done, 2, "unknown key optimizer.learning_rat", "learning_rate")


def test_value_outside_its_rule(darkroom: Darkroom) -> None:
    refused(
        darkroom("train", TINY, "--set", "steps=0"), 2, "steps is not valid", "value:   0", "greater than or equal to 1"
    )


def test_missing_data(darkroom: Darkroom, tmp_path: Path) -> None:
    done = darkroom("train", TINY, "--data", tmp_path / "nowhere")
    refused(done, 1, "There is no data set", "darkroom data build")


def test_impossible_resources(darkroom: Darkroom, stack: Stack, home: Path, small_data: Path) -> None:
    done = darkroom(
        *("train", TINY, "--data", small_data, "--set", "name=huge", "--set", "workers.count=512"),
        *("--set", "global_batch=512"),
    )
    refused(done, 2, "too few CPUs", "workers.count 512", "which the cluster has in all", "workers.count=1")
    assert not (home / "runs" / "huge" / "checkpoints").exists()


def test_unreachable_address(darkroom: Darkroom, small_data: Path) -> None:
    done = darkroom("train", TINY, "--data", small_data, "--address", "http://127.0.0.1:9")
    refused(done, 1, "http://127.0.0.1:9")


def test_a_sweep_without_a_search(darkroom: Darkroom, small_data: Path) -> None:
    refused(darkroom("sweep", TINY, "--data", small_data), 2, "something to search", "loguniform")


def test_a_sweep_over_an_unknown_field(darkroom: Darkroom, stack: Stack, small_data: Path) -> None:
    done = darkroom("sweep", TINY, "--data", small_data, "--search", "optimizer.momentum=choice(1, 2)")
    refused(done, 2, "unknown key optimizer.momentum", "learning_rate")


def test_a_sweep_over_what_would_not_compare(darkroom: Darkroom, small_data: Path) -> None:
    done = darkroom("sweep", TINY, "--data", small_data, "--search", "model.resolution=choice(8, 16)")
    refused(done, 2, "cannot search model.resolution", "another size do not compare", "optimizer.*")


def test_a_sweep_without_held_out_pictures(darkroom: Darkroom, stack: Stack, pictures: Path, tmp_path: Path) -> None:
    build(pictures, tmp_path / "data", BuildConfig(held_out=0.0))
    done = darkroom("sweep", TINY, "--data", tmp_path / "data", "--search", "seed=choice(1, 2)")
    refused(done, 1, "no held-out pictures", "at least one held-out picture", "--held-out")


@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_a_folder_without_a_good_picture(darkroom: Darkroom, tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    if content:
        (source / "a.png").write_bytes(content)
    done = darkroom("data", "build", source, tmp_path / "out")
    refused(done, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
