"""``darkroom demo``: the whole path, every stage of it resumable."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import subject
from cluster.console import RECIPE_HELP, Session, print_json, say, session

if TYPE_CHECKING:
    from cluster.pipeline import Place, Published
    from serving.deployment import Endpoint
    from training.config import TrainConfig

EXAMPLES = {
    "demo": (
        "darkroom demo",
        "darkroom demo --down",
        "darkroom demo pictures/ --recipe base --set steps=2000",
    )
}
SEARCH = "optimizer.learning_rate=loguniform(1e-3, 4e-3)"
STAGES = ("build", "sweep", "train", "evaluate and register", "promote", "deploy", "generate")


@dataclass(frozen=True)
class Report:
    """What the demo leaves behind."""

    contact_sheet: str
    """Pictures from the endpoint."""
    model: str
    """The champion."""
    metrics: dict[str, float]
    """Its held-out loss and kernel distances."""
    mlflow: str
    """The tracking server."""
    api: str
    """The endpoint."""
    stage_s: dict[str, float]
    """Seconds of each stage."""
    total_s: float
    """Seconds in all."""
    peak_gib: float
    """The machine's highest memory use meanwhile, other programs included."""


def demo(
    context: typer.Context,
    source: Annotated[
        Path | None, typer.Argument(help="Pictures of your own, which also name the run; 335 emoji by default.")
    ] = None,
    recipe: Annotated[str, typer.Option(help=RECIPE_HELP)] = "smileys",
    assignments: Annotated[list[str] | None, typer.Option("--set", help="Override a field: section.key=value.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials of the sweep.")] = 4,
    sweep_steps: Annotated[int, typer.Option(min=2, help="Steps of a trial that is not stopped.")] = 40,
    images: Annotated[int, typer.Option(min=4, help="Pictures made for the kernel distance.")] = 128,
    down: Annotated[
        bool, typer.Option("--down", help="Stop what an earlier demo left running; keep its results.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    address: Annotated[str | None, typer.Option(help="A Ray dashboard, http://host:port: run there as a job.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="That cluster's MLflow server.")] = None,
) -> None:
    """From a folder of pictures to an image over HTTP.

    Stages: build, sweep, train, evaluate and register, promote, deploy, generate.

    Run it again after any interruption: finished stages are kept. The stack stays up at the end.
    """
    here = session(context)
    if down:
        from cluster import stack

        stopped = stack.stop(here.home, say)
        say(f"stopped {stopped} processes" if stopped else "nothing was running")
        return
    config = subject.recipe(here.home, source, recipe, assignments or [])
    if address:
        from cluster import jobs, pipeline, words

        said = words.again(
            context,
            recipe=jobs.RECIPE,
            assignments=[f"name={json.dumps(config.name)}", f"data.path={json.dumps(config.data.path)}"],
        )
        files = {jobs.RECIPE: pipeline.as_yaml(config)}
        raise typer.Exit(jobs.run_remotely(address, said, here, tracking_uri=tracking_uri, files=files))
    with _memory() as peak:
        report = _run(here, source, config, trials, sweep_steps, images, peak)
    print_json(asdict(report)) if as_json else _show(report)


def _run(
    here: Session,
    source: Path | None,
    config: TrainConfig,
    trials: int,
    sweep_steps: int,
    images: int,
    peak: list[float],
) -> Report:
    from cluster import pipeline, stack
    from cluster.state import make_home
    from training.config import parse

    clock = _Clock()
    with clock.stage("build"):
        make_home(here.home)
        manifest = subject.build(source, Path(config.data.path))
        kept = f"{manifest.kept} of {manifest.inputs} pictures kept in {config.data.path}"
        say(f"{kept}; the data set is {manifest.hash[:12]}")
    with clock.stage("sweep"):
        place = pipeline.Place(stack.attach(here.home, say), here.home / "runs")
        winner = _sweep(place, config, trials, sweep_steps)
    config = parse(winner)
    with clock.stage("train"):
        if pipeline.finished(place, config):
            say(f"run {config.name} is finished")
        elif pipeline.train(place, config).stopped:
            raise KeyboardInterrupt
    with clock.stage("evaluate and register"):
        published = pipeline.publish(place, config, images=images)
    with clock.stage("promote"):
        _promote(place, published)
    with clock.stage("deploy"):
        endpoint = _deploy(here, place, config)
    with clock.stage("generate"):
        sheet = _generate(endpoint.url, config, here.home / "demo" / "contact_sheet.png")
    return Report(
        contact_sheet=str(sheet),
        model=f"{published.name}/{published.version}",
        metrics=dict(published.metrics),
        mlflow=place.stack.mlflow_url,
        api=endpoint.url,
        stage_s=clock.seconds,
        total_s=round(sum(clock.seconds.values()), 1),
        peak_gib=round(peak[0], 2),
    )


class _Clock:
    """Announces the stages and times them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        say(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)


def _sweep(place: Place, config: TrainConfig, trials: int, steps: int) -> dict[str, Any]:
    """The winner's recipe as plain values; the winner is the one that the run has begun with, where it has begun."""
    from cluster import pipeline, winner
    from training.config import override, parse
    from training.sweep_config import SweepConfig, parse_domain

    space = dict([parse_domain(SEARCH)])
    kept = winner.kept(place, config, space)
    if kept is None:
        sweep = SweepConfig(trials=trials, steps=steps, grace_steps=max(1, steps // 4), seed=config.seed, space=space)
        # one worker a trial, so that as many trials as possible run side by side
        workers = {**config.workers.model_dump(), "count": 1, "min": None, "max": None}
        single = parse({**config.model_dump(mode="json"), "workers": workers})
        best = pipeline.sweep(place, single, sweep)[0]
        kept = dict(best.values)
        told = f"best trial {best.number}: {{}}, held-out loss {best.loss:.4f} after {best.step} steps"
    else:
        told = f"no sweep: the run {config.name} has begun with {{}}"
    say(told.format(", ".join(f"{key}={value}" for key, value in kept.items())))
    values = config.model_dump(mode="json")
    for key, value in kept.items():
        override(values, key, value)
    return values


def _promote(place: Place, published: Published) -> None:
    from training import registry

    version = registry.promote(place.stack.mlflow_url, published.name, published.version)
    say(f"{version.name}/{version.version} is {version.name}@champion")


def _deploy(here: Session, place: Place, config: TrainConfig) -> Endpoint:
    from serving.config import ServeConfig
    from serving.deployment import deploy

    settings = ServeConfig(
        model=f"{config.name}@champion",
        tracking_uri=place.stack.mlflow_url,
        cache=str(here.home / "bundles"),
        port=place.stack.serve_port,
        replica_threads=2,
    )
    return deploy(place.stack.dashboard_url, settings, say)


def _generate(url: str, config: TrainConfig, out: Path) -> Path:
    """Ask the endpoint for the recipe's captions, and lay the pictures out."""
    import io

    from PIL import Image

    from serving.client import request_images
    from training.evaluate.contact_sheet import contact_sheet

    prompts = list(config.evaluation.prompts) or _captions(config)
    pictures = []
    for seed, prompt in enumerate(prompts):
        made = request_images(url, {"prompt": prompt, "seed": seed, "size": "auto"}, timeout_s=300)[0]
        pictures.append(Image.open(io.BytesIO(made.file)).convert("RGB"))
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, prompts).save(out)
    return out


def _captions(config: TrainConfig) -> list[str]:
    from training.data.dataset import Dataset

    train = Dataset.open(config.data.path).split("train")
    return [train.caption(i * len(train) // 16) for i in range(min(16, len(train)))]


@contextmanager
def _memory() -> Iterator[list[float]]:
    """The highest memory use of the machine, in GiB, looked at once a second."""
    import psutil

    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            peak[0] = max(peak[0], psutil.virtual_memory().used / 2**30)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _show(report: Report) -> None:
    from cluster.commands.serve import curl_line

    times = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report.stage_s.items())
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
    for line in (
        "",
        f"pictures    {report.contact_sheet}",
        "            (so small a set is memorised: these are recollections, not inventions)",
        f"model       {report.model}: {metrics}",
        f"MLflow      {report.mlflow}",
        f"API         {report.api}",
        f"try         {curl_line(report.api)}",
        f"seconds     {times}; {report.total_s:.0f} in all",
        f"memory      at most {report.peak_gib:.1f} GiB in use on this machine",
        "stop        darkroom down",
    ):
        typer.echo(line)
