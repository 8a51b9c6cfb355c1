"""Where the work of a ``darkroom data`` command is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.console import Session, say, session

if TYPE_CHECKING:
    from training.data.executor import Executor


class Where(StrEnum):
    """What does the work."""

    AUTO = "auto"
    LOCAL = "local"
    RAY = "ray"


PLACE = "Where it runs"
"""The panel of a command's help that these options are in."""

WhereOption = Annotated[
    Where, typer.Option(rich_help_panel=PLACE, help="Processes here, or Ray; auto is Ray inside a Ray job.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=PLACE, help="A Ray dashboard, http://host:port: run there, on paths that the cluster sees."
    ),
]


@contextmanager
def executor_of(where: Where, workers: int | None, context: typer.Context) -> Iterator[Executor]:
    """What does the work; Ray is joined for it and left again."""
    in_a_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if where is Where.LOCAL or (where is Where.AUTO and not in_a_job):
        from training.data.executor import LocalExecutor

        yield LocalExecutor(workers)
        return
    from training.data.distribute import RayExecutor

    with _joined(session(context), in_a_job=in_a_job):
        yield RayExecutor(workers)


@contextmanager
def _joined(place: Session, *, in_a_job: bool) -> Iterator[None]:
    import ray

    from cluster.pipeline import connect
    from cluster.stack import attach

    if in_a_job:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    else:
        connect(attach(place.home, say))
    try:
        yield
    finally:
        ray.shutdown()
