"""``darkroom models``: what has been published, and which of it is the champion."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training.registry import ModelVersion

_LIST_EXAMPLES = """Examples:

darkroom models list

darkroom models list emoji-faces --json

darkroom models list --tracking-uri http://mlflow.example.org:5000
"""

app = typer.Typer(
    help="List, promote and roll back models.",
    no_args_is_help=True,
    add_completion=False,
    epilog="Examples:\n\ndarkroom models list\n\ndarkroom models promote emoji-faces 3\n\n"
    "darkroom models rollback emoji-faces",
)

Name = Annotated[str, typer.Argument(help="A registered model.")]
Uri = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="An MLflow server; else the local stack's, else MLFLOW_TRACKING_URI's."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command("list", epilog=_LIST_EXAMPLES)
def list_models(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    tracking_uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Every published version, newest first."""
    from training import registry

    found = registry.versions(_uri(context, tracking_uri), name)
    if as_json:
        _print_json([asdict(version) for version in found])
    elif found:
        _print_table(found)
    else:
        typer.echo("No models yet: `darkroom demo` or `darkroom train` publishes one.")


@app.command(
    epilog="Examples:\n\ndarkroom models show emoji-faces@champion\n\ndarkroom models show emoji-faces/3 --json"
)
def show(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(help="NAME@ALIAS, NAME/VERSION or NAME (its champion, else its newest).")],
    tracking_uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """One version in full."""
    from training import registry

    uri = _uri(context, tracking_uri)
    _report(registry.resolve(uri, reference), "", as_json=as_json)


@app.command(epilog="Example: darkroom models promote emoji-faces 3")
def promote(
    context: typer.Context,
    name: Name,
    version: Annotated[int, typer.Argument(min=1, help="The version that gets the alias.")],
    alias: Annotated[str, typer.Option(help="The alias.")] = "champion",
    tracking_uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion; `rollback` knows who was it before."""
    from training import registry

    promoted = registry.promote(_uri(context, tracking_uri), name, version, alias)
    _report(promoted, f"{name}@{alias} is now version {promoted.version}.", as_json=as_json)


@app.command(epilog="Example: darkroom models rollback emoji-faces")
def rollback(
    context: typer.Context,
    name: Name,
    alias: Annotated[str, typer.Option(help="The alias.")] = "champion",
    tracking_uri: Uri = None,
    as_json: AsJson = False,
) -> None:
    """Give the champion's alias back to the version that had it before."""
    from training import registry

    restored = registry.rollback(_uri(context, tracking_uri), name, alias)
    _report(restored, f"{name}@{alias} is version {restored.version} again.", as_json=as_json)


def _uri(context: typer.Context, given: str | None) -> str:
    """The MLflow server to ask: the one that was given, the local stack's, or MLFLOW_TRACKING_URI's.

    The variable comes last, because training and serving use the local stack whatever it says.

    Raises:
        TrackingError: there is none of them.
    """
    from cluster import stack
    from cluster.console import session
    from training.errors import TrackingError

    if given:
        return given
    home = session(context).home
    running = stack.current(home) or stack.find(home)
    if running is not None:
        return running.mlflow_url
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    raise TrackingError(
        "There is no MLflow server to ask.",
        value=str(home),
        rule="a local stack that runs, --tracking-uri, or MLFLOW_TRACKING_URI",
        mend="darkroom up",
    )


def _print_json(value: object) -> None:
    from cluster.console import print_json

    print_json(value)


def _report(version: ModelVersion, headline: str, *, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(version))
        return
    from rich.console import Console
    from rich.table import Table

    if headline:
        typer.echo(headline)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    fields: dict[str, Any] = asdict(version) | {"aliases": ", ".join(version.aliases)}
    metrics = fields.pop("metrics")
    for field, value in [*fields.items(), *((key, f"{number:.5g}") for key, number in metrics.items())]:
        table.add_row(field, str(value))
    Console().print(table)


def _print_table(found: list[ModelVersion]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("model", "version", "aliases", "KID", "held-out loss", "run", "created"):
        right = heading in {"version", "KID", "held-out loss"}
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for version in found:
        figures = [_figure(version.metrics.get(key)) for key in ("kid_held_out", "held_out_loss")]
        row = [version.name, str(version.version), ", ".join(version.aliases), *figures]
        table.add_row(*row, version.run_id[:8], version.created_utc[:10])
    Console().print(table)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
