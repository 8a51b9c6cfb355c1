"""Run a ``darkroom`` command as a job on a Ray cluster, with its logs followed."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.console import Session, say
from cluster.dashboard import Dashboard
from cluster.stack import find, use
from training.errors import StackError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

MAX_FILE_BYTES = 10 * 2**20
"""Recipes and manifests travel with a job; pictures do not."""

INTERRUPTED = 130
"""The exit code of a job that was stopped."""


def run_remotely(address: str, argv: Sequence[str], session: Session, *, tracking_uri: str | None = None) -> int:
    """Run a ``darkroom`` command, less its ``--address``, on the cluster at ``address``; its exit code.

    Args:
        address: of the cluster's dashboard, ``http://host:port``.
        argv: the words after ``darkroom``, e.g. ``sys.argv[1:]``.
        session: of this call.
        tracking_uri: MLflow as the cluster reaches it; by default what MLFLOW_TRACKING_URI says here, else there.

    Raises:
        UsageError: ``address`` is not an HTTP address.
        StackError: nobody answers there, or the token is refused.
    """
    environment = {}
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        environment["MLFLOW_TRACKING_URI"] = uri
    local = find(session.home)
    if local and local.dashboard_url == parse_address(address):
        use(local)
        # the job's working directory is Ray's: `.darkroom` would mean another place there
        environment |= {"DARKROOM_HOME": str(session.home), "MLFLOW_TRACKING_URI": uri or local.mlflow_url}
    elif "DARKROOM_HOME" in os.environ:
        environment["DARKROOM_HOME"] = os.environ["DARKROOM_HOME"]
    words = without_option(argv, "--address")
    entrypoint = ["python", "-m", "cluster", *words]
    with tempfile.TemporaryDirectory(prefix="darkroom-job-") as folder:
        staged = stage_files(words, Path(folder))
        return submit(address, entrypoint, working_dir=Path(folder) if staged else None, environment=environment)


def submit(
    address: str, argv: Sequence[str], *, working_dir: Path | None = None, environment: Mapping[str, str] | None = None
) -> int:
    """Submit ``argv`` as a Ray job, print its logs as they come, and wait for its end; its exit code.

    Ctrl-C stops the job.

    Args:
        address: of the cluster's dashboard, ``http://host:port``.
        argv: the command, as one word each.
        working_dir: sent along and made the job's working directory.
        environment: added to the job's environment.

    Raises:
        UsageError: ``address`` is not an HTTP address.
        StackError: nobody answers there, the token is refused, or Ray will not take the job.
    """
    url = parse_address(address)
    Dashboard(url).get("/api/version")
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job").setLevel(logging.WARNING)  # it reports the end of the log as news
    client = JobSubmissionClient(url)
    runtime_env: dict[str, object] = {"env_vars": dict(environment or {})}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    try:
        job = client.submit_job(entrypoint=shlex.join(argv), runtime_env=runtime_env)
    except RuntimeError as error:  # all that Ray raises here
        raise StackError(f"Ray did not take the job: {error}", value=shlex.join(argv), mend=f"look at {url}") from error
    say(f"job {job} on {url}; Ctrl-C stops it")
    try:
        asyncio.run(_follow(client, job))
        return _exit_code(client, job)
    except KeyboardInterrupt:
        say(f"stopping job {job}")
        client.stop_job(job)
        _exit_code(client, job)
        raise


def parse_address(address: str) -> str:
    """``address`` as ``http://host:port``.

    Raises:
        UsageError: it is something else.
    """
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:  # the port is no number
        valid = False
    if not valid:
        raise UsageError(
            "--address is not the address of a Ray dashboard.",
            value=address,
            rule="http://HOST:PORT of the dashboard (port 8265 unless chosen otherwise), not ray:// or the GCS port",
            options=("http://head.example:8265", "no --address: the local stack"),
        )
    return f"{parts.scheme}://{parts.netloc}"


def without_option(argv: Sequence[str], option: str) -> list[str]:
    """``argv`` without ``option VALUE`` and ``option=VALUE``."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def stage_files(argv: Sequence[str], folder: Path) -> list[Path]:
    """Copy the small files that ``argv`` names relative to the current directory into ``folder``; what was copied.

    A recipe travels with its job like this. A data set does not: it must lie where the cluster can read it.
    """
    here = Path.cwd()
    copied = []
    for word in argv:
        path = Path(word.rpartition("=")[2])
        if path.is_absolute() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            continue
        if not path.resolve().is_relative_to(here.resolve()):
            continue
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        copied.append(path)
    return copied


async def _follow(client: JobSubmissionClient, job: str) -> None:
    """Print a job's logs until it ends; a broken connection ends it too, the job does not."""
    try:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()
    except RuntimeError as error:
        say(f"the connection to the job's logs broke ({error}); waiting for its end")


def _exit_code(client: JobSubmissionClient, job: str) -> int:
    """Wait for a job's end: 0 when it succeeded, else its own exit code."""
    from ray.job_submission import JobStatus

    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.3)
    details = client.get_job_info(job)
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        return INTERRUPTED
    if details.driver_exit_code is None:
        say(f"job {job} failed: {details.message}")
    return details.driver_exit_code or 1
