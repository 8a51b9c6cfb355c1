"""Run a ``darkroom`` command as a job on a Ray cluster, with its logs followed."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.console import Session, say
from cluster.dashboard import Dashboard
from cluster.results import Splitter
from cluster.stack import find, use
from training.errors import StackError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

INTERRUPTED = 130
"""The exit code of a job that was stopped."""

RECIPE = "recipe.yaml"
"""What the recipe is called in a job's working directory."""


def run_remotely(
    address: str,
    words: Sequence[str],
    session: Session,
    *,
    tracking_uri: str | None = None,
    files: Mapping[str, str] | None = None,
) -> int:
    """Run a ``darkroom`` command on the cluster at ``address``; its exit code.

    The job's home is this session's: the same command again finds there what the last one left.

    Args:
        address: of the cluster's dashboard, ``http://host:port``.
        words: the words after ``darkroom``, as ``words.again`` makes them.
        session: of this call.
        tracking_uri: MLflow as the cluster reaches it; by default the local stack's for its own jobs, and for others
            what MLFLOW_TRACKING_URI says here, else there.
        files: by name, the text of small files that the job finds in its working directory.

    Raises:
        UsageError: ``address`` is not an HTTP address, or another cluster has no home that all its nodes see.
        StackError: nobody answers there, or the token is refused.
    """
    environment = {"DARKROOM_HOME": str(session.home)}
    url = parse_address(address)
    local = find(session.home)
    if local and local.dashboard_url == url.replace("//localhost:", "//127.0.0.1:"):
        use(local)
        environment["MLFLOW_TRACKING_URI"] = tracking_uri or local.mlflow_url
    else:
        _require_shared_home(session)
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        environment |= {"MLFLOW_TRACKING_URI": uri} if uri else {}
    entrypoint = ["python", "-m", "cluster", *(["--debug"] if session.debug else []), *words]
    with tempfile.TemporaryDirectory(prefix="darkroom-job-") as folder:
        for name, text in (files or {}).items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return submit(url, entrypoint, working_dir=Path(folder) if files else None, environment=environment)


def _require_shared_home(session: Session) -> None:
    """Refuse a job whose runs would lie below Ray's working directory, where the next job cannot find them.

    Raises:
        UsageError: the home was not named by an absolute path.
    """
    if not session.home_is_absolute:
        raise UsageError(
            "A job on another cluster needs a home that all its nodes see.",
            value=str(session.home),
            rule="an absolute path on storage that every node mounts: runs are kept there and resumed from there",
            options=("--home /shared/darkroom before the command", "DARKROOM_HOME=/shared/darkroom"),
        )


def submit(
    address: str, argv: Sequence[str], *, working_dir: Path | None = None, environment: Mapping[str, str] | None = None
) -> int:
    """Submit ``argv`` as a Ray job, follow it, and wait for its end; its exit code.

    Its stdout goes to ours and its stderr to ours, as they come. Ctrl-C stops the job.

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
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "cluster.results", *argv]), runtime_env=runtime_env
        )
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


async def _follow(client: JobSubmissionClient, job: str) -> None:
    """Pass a job's output on until it ends; a broken connection ends it too, the job does not."""
    output = Splitter(sys.stdout, sys.stderr)
    try:
        async for lines in client.tail_job_logs(job):
            output.take(lines)
    except RuntimeError as error:
        say(f"the connection to the job's logs broke ({error}); waiting for its end")
    finally:
        output.close()


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
