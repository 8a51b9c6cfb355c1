"""What a worker group asks of the cluster: can it ever be given, and is it taken at the moment."""

from __future__ import annotations

import math

import ray

from training.config import TrainConfig
from training.errors import ConfigError
from training.workers_config import WorkersConfig

WAITS_FOR_ROOM_S = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
"""How long Ray Train waits for the places of an elastic group before it counts anew what the cluster has room for; 60 s
unless told. Its count may be 20 s old, and of a node that has been lost since. The user's own setting wins."""


def sizes(workers: WorkersConfig) -> int | tuple[int, int]:
    """The numbers of workers that Ray Train may choose from."""
    return (workers.smallest, workers.largest) if workers.elastic else workers.largest


def check_resources(config: TrainConfig, driver_cpus: float = 0.0) -> int:
    """Refuse what the cluster can never give; Ray would wait for it forever.

    Args:
        config: the recipe.
        driver_cpus: what a trial's driver reserves besides its workers.

    Returns:
        How many such workers the cluster could hold with one driver.

    Raises:
        ConfigError: not even the smallest group fits; states what was asked for and what there is.
    """
    workers = config.workers
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = _room(nodes, workers, driver_cpus)
    fewest, key = workers.smallest, "workers.min" if workers.elastic else "workers.count"
    if fewest <= room:
        return room
    options = [f"{key}={n}" for n in sorted({1, room})] if room else []
    for name, each, more in (("CPU", workers.cpus, driver_cpus), ("GPU", workers.gpus, 0.0)):
        wanted, there = fewest * each + more, sum(node.get(name, 0.0) for node in nodes)
        if wanted > there + 1e-6:
            driver = f" + {more:g} for the trial's driver" if more else ""
            less = math.floor(max(0.0, there - more) / fewest * 100) / 100
            raise ConfigError(
                f"The cluster has too few {name}s for the worker group.",
                value=f"{key} {fewest} x workers.{name.lower()}s {each:g}{driver} = {wanted:g} {name}",
                rule=f"at most {there:g} {name}, which the cluster has in all",
                options=[*options, *([f"workers.{name.lower()}s={less:g}"] if less or name == "GPU" else [])],
            )
    largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    raise ConfigError(
        "The cluster's nodes cannot hold the worker group: a worker has to fit on one of them.",
        value=f"{key} {fewest}, each with {workers.cpus:g} CPU and {workers.gpus:g} GPU",
        rule=f"at most {room} such workers on {len(nodes)} nodes, the largest with {largest:g} CPU",
        options=options or ["smaller workers.cpus", "smaller workers.gpus"],
    )


def _room(nodes: list[dict[str, float]], workers: WorkersConfig, driver_cpus: float) -> int:
    """How many workers fit on nodes of these resources, beside a driver where it takes the least room from them."""

    def fit(node: dict[str, float], cpus_taken: float = 0.0) -> int:
        shares = [(node.get("CPU", 0.0) - cpus_taken) / workers.cpus]
        if workers.gpus:
            shares.append(node.get("GPU", 0.0) / workers.gpus)
        return int(max(0.0, min(shares)) + 1e-6)

    hosts = [fit(node) - fit(node, driver_cpus) for node in nodes if node.get("CPU", 0.0) >= driver_cpus]
    return sum(map(fit, nodes)) - min(hosts) if hosts else 0


def taken() -> str:
    """What workers wait for that exists but is taken; empty while they do not wait for resources."""
    groups = ray.util.placement_group_table()  # of the whole cluster, by id
    if all(group["state"] != "PENDING" for group in groups.values()):
        return ""
    total, free = ray.cluster_resources(), ray.available_resources()
    used = [
        f"{total[name] - free.get(name, 0.0):g} of {total[name]:g} {name}" for name in ("CPU", "GPU") if name in total
    ]
    return f"Waiting for workers: {' and '.join(used)} of the cluster are in use. They start when enough is free."
