"""What a worker group asks for: refused when it can never be given, waited for in words when it is taken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.stack import Stack
from training import ray_train, ray_tune
from training.config import TrainConfig, load_recipe
from training.errors import ConfigError, TrainingError
from training.ray_agent import Mailbox
from training.ray_resources import check_resources
from training.sweep_config import Choice, SweepConfig


@pytest.fixture
def cpus(ray_session: Stack) -> int:
    return int(ray.cluster_resources()["CPU"])


def _config(*assignments: str) -> TrainConfig:
    return load_recipe("base", ["global_batch=1024", *assignments])


def test_the_driver_of_a_trial_counts(cpus: int) -> None:
    config = _config(f"workers.count={2 ** cpus.bit_length() // 2}", "workers.cpus=1")
    share = cpus / config.workers.largest
    config = config.model_copy(update={"workers": config.workers.model_copy(update={"cpus": share})})
    assert check_resources(config) == config.workers.largest
    with pytest.raises(ConfigError, match="too few CPUs") as caught:
        check_resources(config, ray_tune.DRIVER_CPUS)
    assert "0.01 for the trial's driver" in str(caught.value)
    assert f"workers.cpus={share - 0.01:g}" in str(caught.value)


def test_what_the_cluster_has_none_of(cpus: int) -> None:
    with pytest.raises(ConfigError, match=r"too few GPUs(.*\n)*.*options: workers.gpus=0"):
        check_resources(_config("workers.gpus=999"))


def test_of_an_elastic_group_the_smallest_has_to_fit(cpus: int) -> None:
    assert check_resources(_config("workers.min=1", "workers.max=512", "workers.cpus=0.5")) == 2 * cpus
    with pytest.raises(ConfigError, match=rf"workers.min 512 x .*\n.*\n.*options: workers.min=1, workers.min={cpus}"):
        check_resources(_config("workers.min=512", "workers.max=513"))


def test_every_trial_is_checked_before_any_starts(cpus: int, small_data: Path, tmp_path: Path) -> None:
    sweep = SweepConfig(trials=2, space={"workers.count": Choice(values=(1, 512))})
    job = ray_tune.SweepJob(_config(f"data.path={small_data}"), sweep, tmp_path / "sweep", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"workers\.count 512"):
        ray_tune.run(job, lambda event: pytest.fail(f"it began: {event}"))
    assert not job.folder.exists()


@ray.remote
class Holder:
    """Holds CPUs."""

    def ready(self) -> bool:
        return True


@pytest.fixture
def busy(cpus: int) -> Iterator[None]:
    """All CPUs taken, and a worker group that waits for one."""
    holder = Holder.options(num_cpus=cpus).remote()
    assert ray.get(holder.ready.remote(), timeout=60)
    group = ray.util.placement_group([{"CPU": 0.9}])
    yield
    ray.util.remove_placement_group(group)
    ray.kill(holder)


def test_a_wait_for_what_others_hold_is_told(busy: None, cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "SILENCE_S", 0.0)
    heard = threading.Event()
    told: list[dict[str, Any]] = []

    def read(events: list[dict[str, Any]]) -> None:
        told.extend(events)
        if told:
            heard.set()

    assert ray_train.follow(lambda: heard.wait(60), Mailbox.remote(), read) == (False, None)
    (warning,) = told
    assert warning["event"] == "warning"
    assert f"{cpus} of {cpus} CPU" in warning["message"]


def test_the_first_error_of_the_last_attempt_is_the_reason(tmp_path: Path) -> None:
    reader = ray_train._Reader([].append)
    error = {"event": "error", "label": ""}
    reader.read([{**error, "attempt": 1.0, "time_s": 1.0, "message": "mended since"}])
    reader.read([{**error, "attempt": 2.0, "time_s": 3.0, "message": "Connection closed by peer"}])
    reader.read([{**error, "attempt": 2.0, "time_s": 2.0, "message": "the real reason"}])
    with pytest.raises(TrainingError, match="Training failed: the real reason"):
        reader.outcome(ray_train.TrainJob(_config(), tmp_path, ""), RuntimeError("what Ray says"))
