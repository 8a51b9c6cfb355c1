"""What a run costs is added up over its attempts, and energy is measured from a process beside it."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from training import cost, energy
from training.config import parse
from training.cost import AttemptFile
from training.cost_config import CostConfig
from training.errors import ConfigError

PRICED = CostConfig(per_gpu_hour=2.0, per_cpu_hour=0.1, currency="USD")


def attempt(run_dir: Path, number: int, **used: float) -> None:
    folder = run_dir / cost.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    told = {"seconds": 0.0, "cpus": 0.0, "gpus": 0.0, "steps": 0, "flops": 0.0, **used}
    (folder / f"attempt-{number}.json").write_text(json.dumps(told))


def test_hours_and_money_are_those_of_all_attempts(tmp_path: Path) -> None:
    attempt(tmp_path, 1, seconds=3600, cpus=2, gpus=1, flops=1e15)
    attempt(tmp_path, 2, seconds=1800, cpus=4, gpus=2, flops=5e14)
    used = cost.total(tmp_path, PRICED)
    assert (used.attempts, used.seconds, used.cpu_hours, used.gpu_hours) == (2, 5400, 4.0, 2.0)
    assert used.flops == 1.5e15
    assert used.money == pytest.approx(4.4)
    assert used.energy_kwh is None
    metrics = used.metrics(images=2000)
    assert metrics["cost/money"] == pytest.approx(4.4)
    assert metrics["cost/money_per_1000_images"] == pytest.approx(2.2)
    assert "cost/energy_kwh" not in metrics
    assert cost.total(tmp_path, CostConfig()).money is None


def test_energy_is_that_of_all_nodes(tmp_path: Path) -> None:
    attempt(tmp_path, 1, seconds=10)
    for node in (0, 4):
        told = {"seconds": 10.0, "kwh": 0.5, "co2_kg": 0.2}
        cost.energy_file(tmp_path, node).write_text(json.dumps(told))
    used = cost.total(tmp_path, PRICED)
    assert used.energy_kwh == 1.0
    assert used.co2_kg == pytest.approx(0.4)


def test_an_attempt_is_counted_while_it_lasts(tmp_path: Path) -> None:
    AttemptFile(tmp_path, cpus=2, gpus=0)
    running = AttemptFile(tmp_path, cpus=2, gpus=0)
    running.add(5.0)
    running.write()
    used = cost.total(tmp_path, PRICED)
    assert (used.attempts, used.flops) == (2, 5.0)


@pytest.mark.parametrize(
    ("section", "rule"),
    [({"country": "DE"}, "codecarbon's table of countries, such as DEU"), ({"currency": "euro"}, "pattern")],
)
def test_a_price_table_that_means_nothing_is_refused(section: dict[str, str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse({"data": {"path": ""}, "cost": section})


def test_the_process_that_measures_leaves_with_the_one_that_trains(tmp_path: Path) -> None:
    process = energy.start(tmp_path / "energy.json", "DEU", (), share=0.5)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert energy.read(tmp_path / "energy.json") is None, "a short run has no estimate, and imports nothing for one"


@pytest.mark.slow
def test_energy_is_estimated_without_a_network(tmp_path: Path) -> None:
    process = energy.start(tmp_path / "energy.json", "DEU", (), share=0.5)
    deadline = time.monotonic() + 120
    while energy.read(tmp_path / "energy.json") is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    found = energy.read(tmp_path / "energy.json")
    assert found is not None
    assert found.kwh > 0
    assert found.co2_kg == pytest.approx(0.381 * found.kwh, rel=0.01), "Germany's grams for each kWh"


def test_a_killed_run_that_goes_on_has_paid_for_both_attempts(runs: Any, tmp_path: Path, running_process: Any) -> None:
    config = runs.config(steps=200, cost={"per_cpu_hour": 3600.0, "energy": False}, evaluation={"images": 0})
    (first,) = runs.start(config, "paid")
    first.until("step")
    os.kill(running_process(first.log), signal.SIGKILL)
    first.end()
    config["steps"] = 200
    (second,) = runs.start(config, "paid")
    assert second.end() == 0
    (told,) = second.told("account")
    used = cost.total(tmp_path / "paid", parse(config).cost)
    assert used.attempts == 2
    assert told["metrics"]["cost/attempts"] == 2
    assert used.money == pytest.approx(used.seconds * 0.9)
    assert {"data", "forward", "backward", "optimizer", "checkpoint", "evaluation"} <= set(told["time_s"])
