"""The local stack: Ray with its dashboard, and MLflow, as background processes under one folder.

Started once, found again, stopped without touching anybody else's. What runs is in ``stack.json``; a lock file
makes two callers take turns.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster import lifecycle, processes
from cluster.components import Ports, components, direct, mark, ray_environment, temp_dir, token_path
from cluster.dashboard import Dashboard
from cluster.state import Progress, State, locked
from training.errors import StackError, UsageError

SERVE_PORT = 8000
"""Ray Serve's own default, which clusters that we did not start use."""


@dataclass(frozen=True)
class Stack:
    """Where a Ray cluster and an MLflow server can be reached."""

    home: Path
    """The folder of its state, data and logs."""
    ray_address: str
    """``host:port`` for drivers."""
    dashboard_url: str
    """Ray's dashboard, jobs and Serve's REST API."""
    mlflow_url: str
    """The tracking URI."""
    serve_port: int
    """Ray Serve's HTTP proxy listens here once something is deployed."""
    token_path: Path | None
    """The file with Ray's token; None when the surroundings provide it."""

    @property
    def dashboard(self) -> Dashboard:
        """The dashboard's API."""
        return Dashboard(self.dashboard_url, self.token_path)


@dataclass(frozen=True)
class ComponentStatus:
    """One component, as ``darkroom status`` shows it."""

    name: str
    state: Literal["running", "not answering", "stopped"]
    address: str
    pid: int | None
    uptime_s: float | None
    log: Path


def ensure(home: Path, progress: Progress, *, ports: Mapping[str, int] | None = None) -> Stack:
    """Find the stack of ``home`` or start what is missing of it.

    A component that died is started again on its old port with its old data; the others are left alone.

    Args:
        home: made when it is missing.
        progress: told what is started.
        ports: ports that the caller wants, by their names in ``Ports``; the others are chosen free.

    Raises:
        UsageError: a wanted port is in use, or the stack already runs with another one.
        StackError: a component does not come up; what was started is stopped again.
    """
    home = home.absolute()
    with locked(home, progress):
        state = _settle_ports(State.read(home), ports or {})
        wanted = components(home, state.ports, state.processes)
        missing = [part for part in wanted if not lifecycle.runs(part, state, progress)]
        started = time.monotonic()
        for part in missing:
            state = lifecycle.clear(home, state, part, progress)
            state = lifecycle.start(home, state, part, progress)
        lifecycle.await_health(home, state, missing, progress, started)
        return _describe(home, state.ports)


def find(home: Path) -> Stack | None:
    """The stack of ``home`` if all its processes are alive; does not ask whether they answer."""
    home = home.absolute()
    state = State.read(home)
    if state is None:
        return None
    parts = components(home, state.ports, state.processes)
    alive = [(record := state.processes.get(part.name)) and record.find() for part in parts]
    return _describe(home, state.ports) if all(alive) else None


def stop(home: Path, progress: Progress | None = None) -> int:
    """Stop the stack of ``home``, and only that; how many processes that were.

    The data, the token and the ports stay. Where ``home`` was removed under a running stack, its processes are
    found by the mark that they carry.
    """
    home = home.absolute()
    if not home.exists():
        return _stop_marked(home, progress)
    count = 0
    with locked(home, progress):
        state = State.read(home)
        if state is None:
            return _stop_marked(home, progress)
        for part in reversed(components(home, state.ports, state.processes)):
            count += len(processes.family(state.processes.get(part.name), lifecycle.mark_of(home, part)))
            state = lifecycle.clear(home, state, part, progress)
    return count


def _stop_marked(home: Path, progress: Progress | None) -> int:
    """Stop what carries the mark of ``home``'s stack, of which nothing is written down."""
    found = processes.family(None, mark(home))
    if found and progress:
        progress(f"stopping {len(found)} processes of a stack whose folder is gone")
    count = processes.stop(None, mark(home), grace_s=0) if found else 0
    shutil.rmtree(temp_dir(home), ignore_errors=True)
    return count


def status(home: Path) -> list[ComponentStatus]:
    """What runs of ``home``'s stack; empty when there never was one."""
    home = home.absolute()
    state = State.read(home)
    if state is None:
        return []
    found = []
    for part in components(home, state.ports, state.processes):
        record = state.processes.get(part.name)
        alive = record.find() if record else None
        found.append(
            ComponentStatus(
                name=part.name,
                state="stopped" if alive is None else "running" if part.healthy() else "not answering",
                address=part.address,
                pid=record.pid if record and alive else None,
                uptime_s=round(time.time() - record.created_s, 1) if record and alive else None,
                log=lifecycle.log_of(home, part),
            )
        )
    return found


def use(stack: Stack) -> None:
    """Set this process's environment so that Ray, MLflow and DeepSpeed use ``stack``.

    DeepSpeed chooses its accelerator when it is imported: call this first.
    """
    if stack.token_path is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)  # Ray would prefer it to the file
        os.environ.update(ray_environment(stack.token_path))
        os.environ.update(direct())
    os.environ["RAY_ADDRESS"] = stack.ray_address
    os.environ["MLFLOW_TRACKING_URI"] = stack.mlflow_url
    if "ray" in sys.modules:  # it read the mode when it was imported, and keeps a token that it once read
        raylet = sys.modules["ray"]._raylet
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def current(home: Path) -> Stack | None:
    """The cluster that surrounds this process when it is a Ray job, else None.

    Raises:
        StackError: the job was not told of an MLflow server.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or "RAY_ADDRESS" not in os.environ:
        return None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        raise StackError(
            "This Ray job does not know where MLflow is.",
            rule="MLFLOW_TRACKING_URI is set in the job's environment",
            mend="submit with --tracking-uri http://mlflow.example:5000, or export MLFLOW_TRACKING_URI first",
        )
    local = find(home)
    if local and local.ray_address.rpartition(":")[2] == os.environ["RAY_ADDRESS"].rpartition(":")[2]:
        return local
    from ray.dashboard.utils import ray_address_to_api_server_url

    return Stack(
        home=home.absolute(),
        ray_address=os.environ["RAY_ADDRESS"],
        dashboard_url=ray_address_to_api_server_url(os.environ["RAY_ADDRESS"]),
        mlflow_url=os.environ["MLFLOW_TRACKING_URI"],
        serve_port=SERVE_PORT,
        token_path=None,
    )


def attach(home: Path, progress: Progress) -> Stack:
    """The surrounding cluster inside a Ray job, else the local stack, started if need be; and use it."""
    stack = current(home) or ensure(home, progress)
    use(stack)
    return stack


def _settle_ports(state: State | None, wanted: Mapping[str, int]) -> State:
    """The ports to use: those in use, then those wanted, then those of last time, then free ones."""
    if state and any(record.find() for record in state.processes.values()):
        for name, port in wanted.items():
            if getattr(state.ports, name) != port:
                raise UsageError(
                    f"The stack already runs with another {name} port.",
                    value=port,
                    rule="ports are chosen when the stack starts",
                    options=(getattr(state.ports, name),),
                    mend="`darkroom down` first",
                )
        return state
    if len(set(wanted.values())) < len(wanted):
        raise UsageError(
            "Two of the ports are one.", value=dict(wanted), rule="a port for each", options=("leave one out",)
        )
    for name, port in wanted.items():
        processes.require_free(port, f"--{name}-port")
    # of last time's, those that are still free and that nobody wishes for something else
    last = {name: port for name, port in state.ports if not processes.port_taken(port)} if state else {}
    last = {name: port for name, port in last.items() if port not in wanted.values()}
    count = len(Ports.model_fields)
    unused = [port for port in processes.free_ports(3 * count) if port not in {*last.values(), *wanted.values()}]
    fresh = dict(zip(Ports.model_fields, unused[:count], strict=True))
    return State(ports=Ports.model_validate({**fresh, **last, **wanted}), processes=state.processes if state else {})


def _describe(home: Path, ports: Ports) -> Stack:
    return Stack(
        home=home,
        ray_address=f"127.0.0.1:{ports.ray}",
        dashboard_url=f"http://127.0.0.1:{ports.dashboard}",
        mlflow_url=f"http://127.0.0.1:{ports.mlflow}",
        serve_port=ports.serve,
        token_path=token_path(home),
    )
