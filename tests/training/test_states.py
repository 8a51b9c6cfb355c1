"""What a run tells its network: kept beside the images, made by all ranks together, once for all runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.config import parse
from training.data.build import build
from training.data.config import BuildConfig
from training.data.dataset import Dataset
from training.data.encoded.text import TextJob
from training.data.manifest import SPLITS
from training.states import evenly, recipe_prompts


def test_prompts_fill_the_sheet() -> None:
    assert recipe_prompts(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert recipe_prompts(["a", "b"], 1) == ["a"]
    assert recipe_prompts([], 4) == []
    assert recipe_prompts(["a"], 0) == []


@pytest.mark.parametrize(
    ("samples", "count", "ids"),
    [(10, 2, [0, 5]), (10, 5, [0, 2, 4, 6, 8]), (3, 5, [0, 1, 2, 0, 1]), (0, 4, []), (9, 0, [])],
)
def test_samples_are_shown_evenly(samples: int, count: int, ids: list[int]) -> None:
    assert evenly(samples, count) == ids


def test_ranks_encode_together_and_the_next_run_finds_it(runs: Any, tmp_path: Path) -> None:
    data = tmp_path / "copy"
    shutil.copytree(runs.data, data, ignore=shutil.ignore_patterns("encoded"))
    config = runs.config(data={"path": str(data)}, steps=1)
    dataset, job = Dataset.open(data), TextJob(parse(config).conditioning)
    written = []
    for name, world in [("first", 2), ("second", 1)]:
        for rank in runs.start(config, name, world):
            assert rank.end() == 0, rank.log.read_text()
        caches = [job.cache(dataset, split) for split in ("train", "held_out")]
        assert all(cache.find(number, thorough=True) for cache in caches for number in range(len(cache.shards)))
        files = [path for path in (data / "encoded").rglob("*") if path.is_file()]
        written.append({path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files})
    assert written[0] == written[1]
    assert [path.name for path in (data / "encoded").glob("prompts-*")], "the empty caption's states"


def test_a_run_that_is_asked_to_leave_while_it_encodes_tells_how_far_it_is_and_leaves(
    runs: Any, tmp_path: Path
) -> None:
    source, data = tmp_path / "source", tmp_path / "many"
    source.mkdir()
    for number in range(1200):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{number:04d}.png")
        (source / f"{number:04d}.txt").write_text(f"number {number} of {'very ' * 240}many")
    build(source, data, BuildConfig(held_out=0.1))
    pair = runs.start(runs.config(data={"path": str(data)}, conditioning={"max_tokens": 256}), "run", 2)
    told = pair[0].until("encoding")
    assert 0 < told["done"] < told["total"] == sum(len(Dataset.open(data).split(name)) for name in SPLITS)
    pair[0].process.stop()
    assert [rank.end() for rank in pair] == [0, 0], pair[0].log.read_text()[-3000:]
    for rank in pair:
        assert rank.told("done") == [{"event": "done", "step": 0, "stopped": True}]
        assert "captions encoded" not in [event["name"] for event in rank.told("mark")]
