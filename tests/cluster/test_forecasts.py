"""A dry run says what a run will take, and refuses what cannot fit, without starting anything."""

import json
from pathlib import Path
from typing import Any

TINY = ("model.resolution=8", "model.widths=[8,16]", "model.attention=[false,true]", "model.head_width=8")
COMMON = ("base", "--data", "x", "--set", "model.norm_groups=4", "--set", "cost.per_cpu_hour=0.5", "--dry-run")
TOLD = [word for value in TINY for word in ("--set", value)]


def test_a_dry_run_tells_memory_time_and_cost(darkroom: Any, tmp_path: Path) -> None:
    done = darkroom("--home", tmp_path, "train", *COMMON, *TOLD, "--json", timeout_s=280)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["recipe"]["model"]["resolution"] == 8
    found = told["forecast"]
    assert found["memory_bytes"] == sum(found["memory"].values()) > 0
    assert found["seconds"] > 0
    assert found["money"] == 0.5 * found["cpu_hours"]
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_cannot_fit_is_refused_with_what_would(darkroom: Any, tmp_path: Path) -> None:
    done = darkroom("--home", tmp_path, "train", *COMMON, *TOLD, "--set", "global_batch=100000000", timeout_s=280)
    assert done.returncode == 2
    assert "The recipe does not fit: a worker would need" in done.stderr
    assert "engine.micro_batch=" in done.stderr
