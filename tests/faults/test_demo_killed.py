"""The demo, killed without warning in every stage: the same command goes on and ends well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.stack import Stack

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


FEW = ("step 20:", "writing and registering")
"""The same in a training and in a publication, for every day."""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    place = {**os.environ, "DARKROOM_HOME": str(tmp_path)}
    yield place
    subprocess.run([sys.executable, "-m", "cluster", "down"], env=place, check=True)


@pytest.fixture
def shared(stack: Stack) -> Iterator[dict[str, str]]:
    """The session's stack, with nothing served before and afterwards."""
    place = {**os.environ, "DARKROOM_HOME": str(stack.home)}
    yield place
    subprocess.run([sys.executable, "-m", "cluster", "serve", "--down"], env=place, check=True)


@pytest.mark.timeout(280)
def test_killed_in_a_training_and_a_publication(shared: dict[str, str]) -> None:
    shorter = ("--set", "name=demo-killed", "--set", "steps=24", "--trials", "1", "--sweep-steps", "2", "--images", "8")
    assert killed_and_gone_on(FEW, [*COMMAND, *shorter], shared)["model"] == "demo-killed/1"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_every_stage(environment: dict[str, str]) -> None:
    assert killed_and_gone_on(MOMENTS, COMMAND, environment)["model"] == "tiny/1"


def killed_and_gone_on(moments: Sequence[str], command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Kill the command once at each moment, then let it end; its report."""
    for moment in moments:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as demo:
            told = []
            for line in demo.stderr or ():
                told.append(line)
                if moment in line:
                    break
            demo.kill()
        assert moment in told[-1], "".join(told)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert Path(report["contact_sheet"]).is_file()
    return report
