"""The background processes that make up a local stack. To add one, write a function and add it to ``components``."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from cluster.dashboard import Dashboard
from cluster.hardware import cores, gpus
from cluster.processes import ProcessRecord
from training.errors import StackError

OBJECT_STORE_BYTES = 400 * 2**20
"""Darkroom's batches do not travel through Ray; Ray's own default, 30 % of the memory, would be taken from training."""

_LOCAL_HOSTS = ("127.0.0.1", "localhost")
"""Where everything of a local stack listens."""

_ELSEWHERE = frozenset(
    {
        *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_NAMESPACE"),
        *("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_REGISTRY_STORE_URI"),
    }
)
"""The user's variables that point at another cluster or another MLflow."""


class Ports(BaseModel):
    """The TCP ports of one stack; kept between ``down`` and ``up``, so that bookmarks stay valid."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray: int
    """Ray's control store, for drivers."""
    ray_client: int
    """Ray's client server; unused, but Ray insists on one."""
    dashboard: int
    """Ray's dashboard, jobs and Serve's REST API."""
    mlflow: int
    """MLflow's pages and API."""
    serve: int
    """Ray Serve's HTTP proxy."""


@dataclass(frozen=True)
class Component:
    """One process group of the stack."""

    name: str
    """Its name in ``status``, ``stack.json`` and its log file."""
    argv: tuple[str, ...]
    """What starts it."""
    environment: Mapping[str, str]
    """The whole environment."""
    address: str
    """Where people reach it."""
    ports: tuple[int, ...]
    """Must be free before it starts."""
    prepare: Callable[[], None]
    """Called before each start, when nothing of it runs."""
    clean: Callable[[], None]
    """Called after each stop."""
    healthy: Callable[[], bool]
    """Whether it answers."""
    deadline_s: float = 90
    """How long it may take to answer."""
    grace_s: float = 10
    """How long it may take to leave."""


def components(home: Path, ports: Ports, records: Mapping[str, ProcessRecord]) -> tuple[Component, ...]:
    """What a stack in ``home`` consists of, in the order of starting.

    Args:
        home: of the stack.
        ports: of the stack.
        records: the processes that were started before, by component.
    """
    return (ray(home, ports), mlflow(home, ports), fork_server(home, ports, records.get("forks")))


def mark(home: Path) -> str:
    """A short name for ``home``, used where a whole path does not fit."""
    return hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:10]


def token_path(home: Path) -> Path:
    """The file with Ray's token."""
    return home / "ray_token"


def temp_dir(home: Path) -> Path:
    """Where Ray keeps sockets and logs: short, because a socket's path may have 107 bytes at most."""
    return Path("/tmp") / f"darkroom-{os.getuid()}-{mark(home)}"  # noqa: S108 - made 0700 and checked in _make_temp_dir


def mlflow_url(ports: Ports) -> str:
    """The tracking URI."""
    return f"http://127.0.0.1:{ports.mlflow}"


def ray_environment(token: Path) -> dict[str, str]:
    """What a process needs to use a Ray cluster of this machine."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    return environment if gpus() else {**environment, "DS_ACCELERATOR": "cpu"}


def direct() -> dict[str, str]:
    """What keeps a proxy of the user's away from this machine's own addresses."""
    found = {}
    for name in ("NO_PROXY", "no_proxy"):  # both: libraries differ in which they read
        kept = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        found[name] = ",".join([*kept, *(host for host in _LOCAL_HOSTS if host not in kept)])
    return found


def _inherited() -> dict[str, str]:
    """The user's environment as far as it may reach a component."""
    return {name: value for name, value in os.environ.items() if name not in _ELSEWHERE} | direct()


def ray(home: Path, ports: Ports) -> Component:
    """Ray's head node with its dashboard: never without, because Tune leaks placement groups then."""
    folder = temp_dir(home)

    def prepare() -> None:
        _make_token(token_path(home))
        _make_temp_dir(folder)

    # jobs and workers start `python` by name: it must be ours
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    options = {
        "port": ports.ray,
        "ray-client-server-port": ports.ray_client,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": ports.dashboard,
        "dashboard-agent-listen-port": 0,  # 0: the system chooses, so that two stacks never meet
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": folder / "ray",
        "num-cpus": cores(),
        "object-store-memory": OBJECT_STORE_BYTES,
        "log-style": "record",
        "log-color": "false",
    }
    return Component(
        name="ray",
        argv=(
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--{name}={value}" for name, value in options.items()),
        ),
        environment={
            **_inherited(),
            **ray_environment(token_path(home)),
            # without it, Train's clean-up of a stopped trial gives up where the machine has a second Ray
            "RAY_ADDRESS": f"127.0.0.1:{ports.ray}",
            "MLFLOW_TRACKING_URI": mlflow_url(ports),
            "PATH": path,
            # Train and Tune start many small actors; with one per core Ray warns of it at every run
            "RAY_worker_maximum_startup_concurrency": str(max(8, cores())),
        },
        address=f"http://127.0.0.1:{ports.dashboard}",
        ports=(ports.ray, ports.ray_client, ports.dashboard),
        prepare=prepare,
        clean=lambda: shutil.rmtree(folder, ignore_errors=True),
        healthy=Dashboard(f"http://127.0.0.1:{ports.dashboard}", token_path(home)).answers,
    )


def mlflow(home: Path, ports: Ports) -> Component:
    """MLflow's server over SQLite; artifacts travel through it, so that clients need no shared disk."""
    folder = home / "mlflow"
    here = (f"127.0.0.1:{ports.mlflow}", f"localhost:{ports.mlflow}")
    options = {
        "backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "artifacts-destination": folder / "artifacts",
        "host": "127.0.0.1",
        "port": ports.mlflow,
        "workers": 1,
        "allowed-hosts": ",".join(here),
        "cors-allowed-origins": ",".join(f"http://{name}" for name in here),
    }
    return Component(
        name="mlflow",
        argv=(
            *(sys.executable, "-m", "mlflow", "server", "--serve-artifacts"),
            *(f"--{name}={value}" for name, value in options.items()),
        ),
        environment={
            **_inherited(),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # eight more processes and 2 GB, for evaluating language models
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        address=mlflow_url(ports),
        ports=(ports.mlflow,),
        prepare=lambda: folder.mkdir(parents=True, exist_ok=True),
        clean=lambda: None,
        healthy=lambda: _mlflow_answers(mlflow_url(ports)),
    )


def fork_server(home: Path, ports: Ports, record: ProcessRecord | None) -> Component:
    """Holds torch, DeepSpeed and diffusers imported, so that training processes start in a second.

    Its socket is named after the code that it holds. One that lives is known by the socket that it was started with:
    when the code has changed since, a training may still run below it, and agents find or start one of their own.
    """
    from training.agent import socket_path

    environment = {**_inherited(), **ray_environment(token_path(home)), "MLFLOW_DISABLE_TELEMETRY": "true"}
    socket = (record and _socket_of(record)) or socket_path(str(ports.ray), environment)
    return Component(
        name="forks",
        argv=(sys.executable, "-m", "training.agent", "serve", "--socket", str(socket)),
        environment=environment,
        address=str(socket),
        ports=(),
        prepare=lambda: None,
        clean=lambda: socket.unlink(missing_ok=True),
        healthy=socket.exists,
    )


def _socket_of(record: ProcessRecord) -> Path | None:
    """What a living fork server listens on, by its own command line."""
    process = record.find()
    if process is None:
        return None
    with contextlib.suppress(psutil.Error, ValueError, IndexError):  # it ended just now, or is not one
        words = process.cmdline()
        return Path(words[words.index("--socket") + 1])
    return None


def _mlflow_answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url}/health", timeout=3, trust_env=False).text == "OK"
    except httpx.HTTPError:
        return False


def _make_token(path: Path) -> None:
    """Ray's own would be readable by everybody. Whole or absent: a kill between making and filling leaves none.

    Raises:
        StackError: it is there and empty.
    """
    if path.exists():
        path.chmod(0o600)
        if not path.read_text().strip():
            raise StackError(
                "The file with Ray's token is empty.",
                value=str(path),
                rule="64 hexadecimal digits",
                mend="remove the file; `darkroom up` makes another",
            )
        return
    aside = path.with_suffix(".part")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    aside.rename(path)


def _make_temp_dir(path: Path) -> None:
    """Empty, ours and closed to others: its name can be guessed, and others may write in /tmp.

    Raises:
        StackError: somebody else made it.
    """
    if path.is_symlink() or (path.exists() and path.stat().st_uid != os.getuid()):
        raise StackError("Ray's temporary folder belongs to somebody else.", value=str(path), rule="owned by you")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
