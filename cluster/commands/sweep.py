"""``darkroom sweep``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.console import RECIPE_HELP, print_json, say, session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.ray_tune import Trial

EXAMPLES = {
    "sweep": (
        "darkroom sweep smileys --data data/smileys --search 'optimizer.learning_rate=loguniform(5e-4, 5e-3)'",
        "darkroom sweep base --data data/cats --trials 8 --steps 200 --search 'model.layers_per_block=choice(1, 2)'",
    )
}


def sweep(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)] = "base",
    search: Annotated[
        list[str] | None, typer.Option(help="A field to search: key=choice(a, b), uniform(a, b) or loguniform(a, b).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The data set's folder or its URL; the same as --set data.path=...")
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="Override a field: section.key=value.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many sets of values to try.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a trial that is not stopped.")] = 100,
    grace_steps: Annotated[int, typer.Option(min=1, help="Steps before a trial may be stopped.")] = 25,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at a time; as many as fit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trials as JSON.")] = False,
    address: Annotated[str | None, typer.Option(help="A Ray dashboard, http://host:port: run there as a job.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="That cluster's MLflow server.")] = None,
) -> None:
    """Search over the recipe's fields; the best trial has the lowest held-out loss.

    ASHA stops weak trials early. The same command again runs only the trials that have no result or failed.
    """
    from cluster import jobs, pipeline, stack, words
    from training.errors import ConfigError
    from training.sweep_config import SweepConfig, parse_domain

    config = pipeline.load(recipe, assignments or [], data)
    if not search:
        raise ConfigError(
            "A sweep needs something to search.",
            rule="at least one --search key=form",
            options=["optimizer.learning_rate=loguniform(5e-4, 5e-3)", "ema.decay=choice(0.99, 0.995)"],
        )
    space = dict(parse_domain(text) for text in search)
    sweep_config = SweepConfig(
        trials=trials, steps=steps, grace_steps=grace_steps, concurrent=concurrent, seed=config.seed, space=space
    )
    here = session(context)
    if address:
        said = words.again(context, recipe=jobs.RECIPE, data=None, assignments=None)
        files = {jobs.RECIPE: pipeline.as_yaml(config)}
        raise typer.Exit(jobs.run_remotely(address, said, here, tracking_uri=tracking_uri, files=files))
    pipeline.check_data(config)
    place = pipeline.Place(stack.attach(here.home, say), here.home / "runs")
    done = pipeline.sweep(place, config, sweep_config)
    if as_json:
        print_json([vars(trial) | {"values": dict(trial.values)} for trial in done])
    else:
        _show(done, place.stack.mlflow_url)


def _show(trials: Sequence[Trial], mlflow_url: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "trial", "values", "status", "steps", "held-out loss")
    for place, trial in enumerate(trials):
        values = ", ".join(f"{key}={value}" for key, value in trial.values.items())
        loss = "-" if trial.loss is None else f"{trial.loss:.4f}"
        table.add_row("best" if place == 0 else "", str(trial.number), values, trial.status, str(trial.step), loss)
    Console().print(table)
    for trial in trials:
        if trial.reason:
            typer.echo(f"trial {trial.number} failed: {trial.reason}")
    best = " ".join(f"--set {key}={value}" for key, value in trials[0].values.items())
    typer.echo(f"train the best: darkroom train ... {best}")
    typer.echo(f"MLflow: {mlflow_url}")
