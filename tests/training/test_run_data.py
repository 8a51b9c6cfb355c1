"""A run over pictures of several shapes, each varied: it trains, and says what it cuts and how much memory it takes."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.data.build import build
from training.data.config import BuildConfig


def test_a_run_trains_on_several_shapes_of_varied_pictures(runs: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(36):
        height, width = [(24, 48), (48, 24), (32, 32)][number % 3]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg", quality=95)
    build(folder, tmp_path / "data", BuildConfig(held_out=0))
    data = {
        "path": str(tmp_path / "data"),
        "buckets": {"aspect_limit": 2, "step": 4},
        "augment": {"flip": 0.5, "zoom": 1.2, "crop": "random", "rotate_degrees": 5, "saturation": 0.2},
        "disk_cache": {"folder": str(tmp_path / "cache")},
    }
    config = runs.config(data=data, steps=8, model={"resolution": 16}, evaluation={"images": 0}, workers={"count": 2})
    ranks = runs.start(config, "shapes", world=2)
    assert [rank.end() for rank in ranks] == [0, 0], ranks[0].log.read_text()[-3000:]
    shapes, memory = (each["message"] for each in ranks[0].told("info"))
    assert "pictures are cut to 12 x 20 (12), 16 x 16 (12), 20 x 12 (12)" in shapes
    assert "lie outside the cuts" in shapes
    assert "batches take up to" in memory
    assert ranks[1].told("info") == []
    assert list((tmp_path / "cache" / "buckets").glob("*.npy"))
