"""``darkroom train``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.console import RECIPE_HELP, print_json, say, session

if TYPE_CHECKING:
    from training.config import TrainConfig

EXAMPLES = {
    "train": (
        "darkroom train smileys --data data/smileys",
        "darkroom train base --data data/cats --set name=cats --set steps=5000 --set model.resolution=64",
        "darkroom train finetune --data data/cats --set start.pipeline=models/sd --set adapter.kind=lora",
        "darkroom --home /shared/darkroom train my-recipe.yaml --address http://head:8265",
    )
}


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)] = "base",
    data: Annotated[
        str | None, typer.Option(help="The data set's folder or its URL; the same as --set data.path=...")
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="Override a field: section.key=value.")] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Evaluate and register the model at the end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole recipe and what it will take; start nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
    address: Annotated[str | None, typer.Option(help="A Ray dashboard, http://host:port: run there as a job.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="That cluster's MLflow server.")] = None,
) -> None:
    """Train a model; the same command again resumes from the newest checkpoint.

    Ctrl-C saves a checkpoint and leaves.
    """
    import psutil

    began_s = psutil.Process().create_time()
    from cluster import jobs, pipeline, stack, words
    from training import cost

    config = pipeline.load(recipe, assignments or [], data)
    if dry_run:
        _show_forecast(config, session(context).home / "runs", as_json=as_json)
        return
    here = session(context)
    if address:
        said = words.again(context, recipe=jobs.RECIPE, data=None, assignments=None)
        files = {jobs.RECIPE: pipeline.as_yaml(config)}
        raise typer.Exit(jobs.run_remotely(address, said, here, tracking_uri=tracking_uri, files=files))
    pipeline.check_data(config)
    place = pipeline.Place(stack.attach(here.home, say), here.home / "runs")
    outcome = pipeline.train(place, config, began_s)
    run_dir = place.run_dir(config.name)
    used = cost.total(run_dir, config.cost)
    result = {
        "step": outcome.step,
        "stopped": outcome.stopped,
        "metrics": dict(outcome.metrics),
        "cost": {
            **asdict(used),
            "per_1000_images": used.per_1000(outcome.step * config.global_batch),
            "currency": config.cost.currency,
        },
        "run_id": outcome.run_id,
        "run_dir": str(run_dir),
        "mlflow": f"{place.stack.mlflow_url}/#/runs/{outcome.run_id}",
    }
    if publish and not outcome.stopped:
        version = pipeline.publish(place, config)
        result["model"] = f"{version.name}/{version.version}"
    if as_json:
        print_json(result)
    else:
        _show(result)
    if outcome.stopped:
        say("interrupted; the same command goes on from there")
        raise typer.Exit(130)


def _show_forecast(config: TrainConfig, runs: Path, *, as_json: bool) -> None:
    from cluster import forecasts, pipeline

    told = forecasts.of_this_machine(config, runs)
    if as_json:
        print_json({"recipe": config.model_dump(mode="json"), "forecast": asdict(told)})
        return
    typer.echo(pipeline.as_yaml(config))
    typer.echo(forecasts.account(told))


def _show(result: dict[str, object]) -> None:
    typer.echo(f"steps done: {result['step']}   held-out loss: {result['metrics']}")
    typer.echo(f"run folder: {result['run_dir']}")
    typer.echo(f"MLflow run: {result['mlflow']}")
    if "model" in result:
        typer.echo(f"registered: {result['model']}")
