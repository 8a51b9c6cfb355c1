"""One real stack for the whole test session, in a folder of its own, stopped at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from cluster import stack as stacks
from cluster.console import say
from cluster.stack import Stack

# started in the background, this process ignores SIGINT, and the commands that it starts would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may be looked up on a model hub

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

Darkroom = Callable[..., "subprocess.CompletedProcess[str]"]
"""``darkroom("status", "--json", timeout_s=60)``: the command line as a process of its own."""


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """The home of the session's stack; its path is short, because sockets lie below such folders."""
    folder = Path(tempfile.mkdtemp(prefix="dr-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def stack(home: Path) -> Iterator[Stack]:
    """A running Ray with dashboard and token, and MLflow. Shared: leave it as you found it."""
    yield stacks.ensure(home, say)
    stacks.stop(home)


@pytest.fixture(scope="session")
def mlflow_uri(stack: Stack) -> str:
    """The tracking URI of the session's MLflow server."""
    return stack.mlflow_url


@pytest.fixture
def ray_session(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """This process as a driver of the session's Ray; disconnected afterwards."""
    told = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "DS_ACCELERATOR")
    for name in (*told, "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that `use` is undone
    stacks.use(stack)
    import ray

    ray.init(log_to_driver=False, namespace="tests")
    yield stack
    ray.shutdown()


@pytest.fixture(scope="session")
def darkroom(home: Path) -> Darkroom:
    """Runs the command line with the session's home; it is for the caller to have ``stack`` started."""

    def run(*argv: str | Path, timeout_s: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DARKROOM_HOME": str(home), "COLUMNS": "160", **options.pop("env", {})}
        return subprocess.run(
            [sys.executable, "-m", "cluster", *map(str, argv)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            **options,
        )

    return run
