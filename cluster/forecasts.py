"""Forecasts for the command line: of the cluster's workers before they start, or of this machine for a dry run."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.console import say
from training.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.forecast import Forecast


def require_room(config: TrainConfig, run_dir: Path) -> Future[None]:
    """Look ahead before a worker starts, and keep the forecast beside the run. The driver has joined Ray.

    A recipe that was looked at before, with the same workers, is not looked at again.

    Returns:
        What is waited for before a worker starts: looking takes a second or more of another process, beside which
        this one gets ready. Its result raises ConfigError where the recipe does not fit; the message says what would.
    """
    from training import forecast

    looked: Future[None] = Future()
    gpu, memory_bytes = _worker(config)
    known = forecast.read(run_dir)
    if known is not None and known.key == forecast.key_of(config, gpu or "CPU") and known.images == _images(config):
        looked.set_result(None)
        return looked
    wished = {"gpu": gpu, "memory_bytes": memory_bytes, "runs": str(run_dir.parent)}

    def look() -> None:
        try:
            told = _asked(config, run_dir, wished)
            if told is not None:
                forecast.write(run_dir / forecast.FILE, told)
            looked.set_result(None)
        except BaseException as error:  # noqa: BLE001  raised where the result is waited for
            looked.set_exception(error)

    # a daemon: a command that is refused meanwhile for another reason leaves at once
    threading.Thread(target=look, daemon=True, name="forecast").start()
    return looked


def of_this_machine(config: TrainConfig, runs: Path) -> Forecast:
    """For a dry run, which starts nothing: as if this machine were the cluster.

    Raises:
        ConfigError: the recipe does not fit.
    """
    from cluster import hardware
    from training import device, forecast

    gpus = hardware.gpus()
    gpu = gpus[0] if config.workers.gpus and gpus else None
    precision = device.precision_on(config, gpu)
    if gpu is not None:
        on = device.of_gpu(gpu, precision)
    else:
        import diffusers  # noqa: F401  what a worker has imported takes memory, which this process then shows

        on = device.of_cpu(config.workers.threads, precision, device.node_memory_bytes() // config.workers.largest)
    return forecast.make(config, on, precision, runs)


def account(told: Forecast) -> str:
    """For people."""
    from training.memory_forecast import gib

    parts = ", ".join(f"{name} {gib(size)}" for name, size in told.memory.items())
    room = f" of {gib(told.capacity_bytes)}" if told.capacity_bytes else ""
    size = f"{told.parameters:,} parameters, {told.flops_per_image / 1e9:.2f} GFLOP for an image"
    lines = [
        f"network:  {size}, {told.precision} on {told.world} x {told.device}",
        f"memory:   {gib(told.memory_bytes)}{room} for a worker ({parts})",
    ]
    if told.seconds is None or told.images_per_s is None:
        lines.append("time:     unknown: neither an earlier run nor a table says how fast this device is")
    else:
        rate = f"{told.images_per_s:.1f} images/s, by {told.rate_from}"
        lines.append(f"time:     {duration(told.seconds)} of steps at {rate}")
        lines.append(f"hours:    {told.gpu_hours or 0:.2f} of GPUs, {told.cpu_hours or 0:.2f} of CPUs")
    if told.money is not None:
        lines.append(f"cost:     {told.money:.2f} {told.currency}")
    if told.energy_kwh is not None:
        lines.append(f"energy:   {told.energy_kwh:.3f} kWh")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _images(config: TrainConfig) -> int:
    return config.steps * config.global_batch


def _worker(config: TrainConfig) -> tuple[str | None, int | None]:
    """The GPUs that workers get, by Ray's name, and what memory one of them may take on the roomiest node."""
    import ray

    nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if config.workers.gpus:
        names = {
            name.removeprefix("accelerator_type:") for node in nodes for name in node if "accelerator_type:" in name
        }
        return (min(names) if names else "GPU"), None
    # Ray keeps a part of a node's memory for its object store, and counts the rest
    room = [
        node["memory"] / max(1, min(config.workers.largest, int(node["CPU"] / config.workers.cpus)))
        for node in nodes
        if node.get("CPU") and node.get("memory")
    ]
    return None, int(max(room)) if room else None


def _asked(config: TrainConfig, run_dir: Path, more: dict[str, Any]) -> Forecast | None:
    """Let the node's fork server look ahead."""
    import ray

    from training import agent
    from training.forecast import Forecast

    environment = os.environ if config.workers.gpus else {**os.environ, "DS_ACCELERATOR": "cpu"}
    cluster = ray.get_runtime_context().gcs_address.rsplit(":", 1)[-1]
    log = run_dir / "logs" / "forecast.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    spec = {"config": config.model_dump(mode="json"), **more}
    try:
        process = agent.launch(agent.socket_path(cluster, environment), "forecast", spec, log, environment)
    except (TrainingError, OSError) as error:
        say(f"The run is not forecast: {error}")
        return None
    try:
        for event in process.events():
            if event["event"] == "forecast":
                return Forecast(**{key: value for key, value in event.items() if key != "event"})
            if event["event"] == "error":
                if event.get("typed"):
                    raise ConfigError(event["message"])
                say(f"The run is not forecast: {event['message']}; its log is {log}")
    finally:
        process.close()
    return None
