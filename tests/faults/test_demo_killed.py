"""The demo, killed without warning in every stage: the same command goes on and ends well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TINY = Path(__file__).resolve().parents[1] / "end_to_end" / "tiny.yaml"
COMMAND = [
    *(sys.executable, "-m", "cluster", "demo", "--recipe", str(TINY), "--json"),
    *("--set", "steps=60", "--set", "checkpoint.every_steps=10", "--set", "evaluation.every_steps=20"),
    *("--trials", "2", "--sweep-steps", "6", "--images", "16"),
]
MOMENTS = (
    "starting mlflow",
    "trial 0: first step",
    "[3/7] train",
    "step 20:",
    "measuring",
    "writing and registering",
    "deploying tiny",
    "[7/7] generate",
)
"""What the demo says when it is killed."""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    place = {**os.environ, "DARKROOM_HOME": str(tmp_path)}
    yield place
    subprocess.run([sys.executable, "-m", "cluster", "down"], env=place, check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_every_stage(environment: dict[str, str]) -> None:
    for moment in MOMENTS:
        with subprocess.Popen(
            COMMAND, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as demo:
            reached = any(moment in line for line in demo.stderr or ())
            demo.kill()
        assert reached, moment
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"] == "tiny/1"
    assert Path(report["contact_sheet"]).is_file()
