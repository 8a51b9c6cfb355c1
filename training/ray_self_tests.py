"""Self-tests on a cluster: agents on its nodes, each forking the processes of every check anew."""

from __future__ import annotations

import shutil
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from training import agent
from training.errors import TrainingError
from training.ray_agent import fork_server_of, process_environment
from training.self_tests import CHECKS, PREPARED
from training.self_tests.finding import Finding, failed, parse
from training.self_tests.spec import SelfTestSpec

PLACE_S, CHECK_S = 60.0, 180.0
"""How long is waited for the workers' places, and for a check."""
_CPUS = 0.9


@dataclass(frozen=True)
class Group:
    """Who takes part.

    Attributes:
        workers: how many processes a check has.
        gpus: of each.
        nodes: over how many of the cluster's they are spread.
    """

    workers: int
    gpus: int
    nodes: int


def group_for(workers: int | None) -> Group:
    """One worker on each node and two at least; no more than the cluster has cores or, where it has any, GPUs for.

    Args:
        workers: another number of them.

    Raises:
        TrainingError: the cluster can never give so many their places.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node["Resources"].get("GPU", 0) for node in nodes))
    room = sum(int(node["Resources"].get("CPU", 0) / _CPUS) for node in nodes)
    room = min(room, gpus) if gpus else room
    wanted = workers or min(max(2, len(nodes)), room)
    if not 1 <= wanted <= room:
        raise TrainingError(
            f"The cluster has no place for {wanted or 'any'} workers.",
            value=f"{len(nodes)} nodes, {gpus} GPUs",
            rule=f"{_CPUS} of a core{' and a GPU' if gpus else ''} for each: {room} at most",
            mend="darkroom doctor --deep --workers N, or a larger cluster",
        )
    return Group(wanted, int(gpus > 0), len(nodes))


@ray.remote(max_restarts=0)
class Tester:
    """An agent: forks one rank of a check, and follows it."""

    def place(self) -> tuple[str, str, int]:
        """This node, its address, and a port that is free there."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), probe.getsockname()[1]

    def run(self, spec: Mapping[str, Any], gpus: int, log: str) -> list[dict[str, Any]]:
        """Run a rank to its end; its events, of which the last is its exit."""
        environment = process_environment({"workers": {"gpus": gpus}})
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        process = agent.launch(fork_server_of(environment), "self_test", spec, Path(log), environment)
        try:
            return list(process.events())
        finally:
            process.close()


def run(folder: Path, workers: int | None, told: Callable[[Finding], None], begin: Callable[[str, str], None]) -> Group:
    """Make every check.

    Args:
        folder: on storage that every node sees; made, and removed if nothing failed.
        workers: how many processes; None for one per node and two at least.
        told: gets each finding as it comes.
        begin: gets each check's name, and what it is about, before it is made.

    Returns:
        Who took part.

    Raises:
        TrainingError: the cluster gives the workers no place.
    """
    group = group_for(workers)
    place = folder / f"self-tests-{uuid.uuid4().hex[:8]}"
    with _testers(group) as testers:
        failures = 0
        for check, about in CHECKS.items():
            begin(check, about)
            found = _check(testers, group, check, place)
            failures += not found.ok
            told(found)
    if not failures:
        shutil.rmtree(place, ignore_errors=True)
    return group


@contextmanager
def _testers(group: Group) -> Iterator[list[Any]]:
    bundle = {"CPU": _CPUS} | ({"GPU": group.gpus} if group.gpus else {})
    places = placement_group([bundle] * group.workers, strategy="SPREAD")
    try:
        if not places.wait(PLACE_S):
            raise TrainingError(
                f"The cluster gave no place to {group.workers} workers within {PLACE_S:.0f} s.",
                value=ray.available_resources(),
                rule=f"{bundle} for each",
                mend="wait until other runs end, or darkroom doctor --deep --workers N",
            )
        strategy = PlacementGroupSchedulingStrategy(places)
        options = {"num_cpus": _CPUS, "num_gpus": group.gpus, "scheduling_strategy": strategy}
        yield [Tester.options(**options).remote() for _ in range(group.workers)]  # type: ignore[attr-defined]
    finally:
        remove_placement_group(places)  # and what ran in it


def _check(testers: list[Any], group: Group, check: str, place: Path) -> Finding:
    """One check, in processes of its own; what keeps it from being made is a finding too."""
    log = place / "logs"
    events: list[list[dict[str, Any]]] = []
    try:
        for phase in ("prepare", "check") if check in PREPARED else ("check",):
            events = _attempt(testers, group, check, phase, place)
            wrong = next((reason for reason in map(_wrong, events) if reason), None)
            if wrong and not (phase == "prepare" and _all_killed(events)):
                return failed(check, wrong, f"the logs {log}/{check}-*.log tell more")
    except ray.exceptions.GetTimeoutError:
        why = f"{group.workers} processes did not end within {CHECK_S:.0f} s"
        return failed(check, why, f"do the nodes reach one another? the logs {log}/{check}-*.log tell more")
    except ray.exceptions.RayError as error:
        return failed(check, f"a worker was lost: {str(error).splitlines()[0]}", "darkroom status shows the cluster")
    found = [event for told in events for event in told if event["event"] == "finding"]
    if not found:
        return failed(check, "rank 0 told nothing", f"the logs {log}/{check}-*.log tell more")
    return parse({key: value for key, value in found[0].items() if key != "event"})


def _attempt(testers: list[Any], group: Group, check: str, phase: Any, place: Path) -> list[list[dict[str, Any]]]:
    """One process on every tester; their events."""
    places = ray.get([tester.place.remote() for tester in testers], timeout=CHECK_S)
    _, address, port = places[0]
    folder = place / check
    folder.mkdir(parents=True, exist_ok=True)
    seen: Counter[str] = Counter()
    running = []
    for rank, (tester, (node, _, _)) in enumerate(zip(testers, places, strict=True)):
        spec = SelfTestSpec(check, phase, str(folder), rank, seen[node], group.workers, address, port)
        seen[node] += 1
        log = place / "logs" / f"{check}-{phase}-{rank}.log"
        running.append(tester.run.remote(asdict(spec), group.gpus, str(log)))
    events: list[list[dict[str, Any]]] = ray.get(running, timeout=CHECK_S)
    return events


def _wrong(events: list[dict[str, Any]]) -> str | None:
    """What went wrong in a rank."""
    for event in events:
        if event["event"] == "error":
            return str(event["message"]).splitlines()[0]
    code = events[-1].get("code") if events else None
    return None if code == 0 else f"a process ended with {code}"


def _all_killed(events: list[list[dict[str, Any]]]) -> bool:
    return all(told and told[-1].get("code") == -9 for told in events)
