"""Exactness of whole runs: the same curve over worlds and ZeRO stages, the same weights whatever interrupts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

GOLDEN: list[float] = json.loads(Path(__file__).with_name("golden.json").read_text())["losses"]
TOLERANCE = 1e-5
"""Relative, of a loss in fp32: fifty times what sums in another order make of it (2e-7 between one worker and four)."""


def trained(warm: Any, out: Path, *words: str) -> dict[str, Any]:
    """What ``golden_ranks.py`` found."""
    warm.run("golden_ranks", out, *words)
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, warm: Any) -> dict[str, Any]:
    return trained(warm, tmp_path_factory.mktemp("golden"))


def is_golden(run: dict[str, Any]) -> bool:
    """Whether a run's every loss is the golden one."""
    assert set(run["codes"]) == {0}
    assert run["steps"] == list(range(1, len(GOLDEN) + 1))
    return bool(run["losses"] == pytest.approx(GOLDEN, rel=TOLERANCE))


def test_world_sizes_and_zero_stages_have_the_golden_curve(results: dict[str, Any]) -> None:
    assert len(results["whole"]) == 5
    curves = {case: run["losses"] for case, run in results["whole"].items() if not is_golden(run)}
    assert curves == {}


@pytest.mark.slow
def test_the_other_combinations_have_it_too(tmp_path: Path, warm: Any) -> None:
    others = trained(warm, tmp_path, "--cases", "1-1", "1-2", "1-3", "2-2", "4-0", "4-1", "4-3")["whole"]
    assert [case for case, run in others.items() if not is_golden(run)] == []


@pytest.mark.parametrize("stage", [1, 3])
def test_an_interrupted_run_ends_in_the_same_weights_bit_for_bit(results: dict[str, Any], stage: int) -> None:
    undisturbed = results["whole"][f"2-{stage}"]
    again = {name: run for name, run in results["interrupted"].items() if run["stage"] == stage}
    assert again
    for name, run in again.items():
        assert run["step"] == len(GOLDEN), name
        assert run["refused"] == [], name
        assert run["digest"] == undisturbed["digest"], name
        assert run["losses"] == undisturbed["losses"], name


def test_leaving_in_order_loses_no_step(results: dict[str, Any]) -> None:
    run = results["interrupted"]["left in order"]
    assert run["codes"] == [[0, 0], [0, 0]]
    assert run["steps"] == sorted(set(run["steps"])), "no step was taken twice"


def test_a_kill_costs_the_steps_since_the_last_durable_checkpoint(results: dict[str, Any]) -> None:
    run = results["interrupted"]["killed, durable"]
    assert run["codes"][0][0] == -9
    assert run["resumed"] == [3]
    assert run["steps"] == [1, 2, 3, 4, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["killed, node memory", "other rank killed, node memory"])
def test_node_memory_loses_at_most_one_step(results: dict[str, Any], name: str) -> None:
    run = results["interrupted"][name]
    assert -9 in run["codes"][0]
    assert run["codes"][1] == [0, 0]
    (resumed,) = run["resumed"]
    assert resumed >= 3, "nothing is on disk: what it went on from lay in the node's memory"
    assert run["step"] == len(GOLDEN)
