"""``darkroom serve``: a model behind HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import rollouts
from cluster.console import Session, print_json, say, session
from training.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from pydantic import ValidationError

    from serving.config import ServeConfig
    from serving.deployment import Endpoint

EXAMPLES = {
    "serve": (
        "darkroom serve emoji@champion",
        "darkroom serve emoji/3 --port 8000 --min-replicas 2 --max-replicas 8",
        "darkroom serve path/to/bundle --json",
        "darkroom serve emoji/4 --canary 10 --bake 600",
        "darkroom serve emoji@champion --follow 30 --canary 5",
        "darkroom serve cats@champion --beside",
        "darkroom serve --down",
    ),
}

_OPTIONS = {
    "deploy_timeout_s": "--timeout",
    "graceful_shutdown_timeout_s": "--drain-timeout",
    "idle_s": "--idle",
    "percent": "--canary or --shadow",
}
"""Options that are not called what their setting is."""


def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="NAME@champion, NAME/3, NAME, or a bundle's directory.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for everybody.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port to listen on; the stack's own by default.")] = None,
    min_replicas: Annotated[int, typer.Option(help="Replicas kept when nothing is asked.")] = 1,
    max_replicas: Annotated[int, typer.Option(help="Replicas under load.")] = 2,
    idle_s: Annotated[
        float, typer.Option("--idle", help="Seconds without a request until none is kept, with --min-replicas 0.")
    ] = 300.0,
    target_ongoing_requests: Annotated[float, typer.Option(help="Requests in flight per replica to scale to.")] = 4.0,
    max_batch_rows: Annotated[int, typer.Option(help="The widest call of the network that is tried.")] = 8,
    padded_rows: Annotated[
        int | None,
        typer.Option(help="Rows of one call of the network, always full; the best width by default, measured."),
    ] = None,
    max_waiting_images: Annotated[int, typer.Option(help="Images that may wait before requests are refused.")] = 64,
    max_steps: Annotated[int, typer.Option(help="Largest num_inference_steps.")] = 100,
    replica_cpus: Annotated[float, typer.Option(help="CPUs that Ray reserves per replica.")] = 0.1,
    replica_gpus: Annotated[float, typer.Option(help="GPUs that Ray reserves per replica.")] = 0.0,
    replica_threads: Annotated[int, typer.Option(help="Threads of a replica's tensor operations.")] = 1,
    drain_timeout_s: Annotated[
        float, typer.Option("--drain-timeout", help="Seconds that a stopping replica has to finish its requests.")
    ] = 120.0,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds until it must be up.")] = 180.0,
    canary: Annotated[
        float | None,
        typer.Option(help="Try it on this percentage of the requests; then it serves.", show_default=False),
    ] = None,
    shadow: Annotated[
        float | None,
        typer.Option(help="Try it on copies of this percentage of the requests.", show_default=False),
    ] = None,
    bake_s: Annotated[float, typer.Option("--bake", help="Seconds for which a canary or shadow is watched.")] = 300.0,
    max_error_rate: Annotated[float, typer.Option(help="Share of failures above which it is rolled back.")] = 0.05,
    min_requests: Annotated[int, typer.Option(help="Requests until that is judged.")] = 20,
    follow_s: Annotated[
        float | None,
        typer.Option(
            "--follow", help="Seconds between two looks at the alias; stays, and rolls out what it points at."
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting, e.g. speed.bf16=true; repeatable."),
    ] = None,
    beside: Annotated[bool, typer.Option("--beside", help="For requests that name it; the main model stays.")] = False,
    address: Annotated[str | None, typer.Option(help="A cluster's dashboard; the local stack by default.")] = None,
    down: Annotated[bool, typer.Option("--down", help="Take the endpoint down.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Put a model behind an HTTP endpoint that speaks OpenAI's Images API; a running one is replaced without outage."""
    opened = session(context)
    if address is not None:
        from cluster import jobs, words

        # a bundle's folder means the same place there; the name of a registered model is no path
        named = str(Path(model).absolute()) if model and Path(model).is_dir() else model
        raise typer.Exit(jobs.run_remotely(address, words.again(context, model=named), opened))
    if down:
        _take_down(opened, json, model if beside else None)
        return
    if model is None:
        raise UsageError(
            "No model was named.", rule="darkroom serve MODEL", options=["NAME@champion", "path/to/bundle"]
        )
    from cluster.stack import attach

    stack = attach(opened.home, say)
    settings: dict[str, Any] = {
        "model": model,
        "tracking_uri": stack.mlflow_url,
        "cache": str(opened.home / "bundles"),
        "host": host,
        "port": port or stack.serve_port,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "idle_s": idle_s,
        "target_ongoing_requests": target_ongoing_requests,
        "replica_cpus": replica_cpus,
        "replica_gpus": replica_gpus,
        "replica_threads": replica_threads,
        "graceful_shutdown_timeout_s": drain_timeout_s,
        "deploy_timeout_s": timeout_s,
        "batch": {
            "padded_rows": padded_rows,
            "max_batch_rows": max_batch_rows,
            "max_waiting_images": max_waiting_images,
        },
        "limits": fitting_limits(max_steps, max_waiting_images),
        "admission": {"quotas": str(opened.home / "quotas")},
        "jobs": {"folder": str(opened.home / "jobs")},
    }
    from training.config import assign

    for assignment in assignments or ():
        assign(settings, assignment)
    config = checked_config(settings)
    from serving.model import pinned

    trial = rollouts.trial_of(canary, shadow, max_error_rate=max_error_rate, min_requests=min_requests)
    with _options_named():
        roll_out = rollouts.way(stack, trial, bake_s, beside=beside)
        first = roll_out if follow_s is None else rollouts.way(stack, None, bake_s, beside=beside)
        current = pinned(config)
        endpoint = first(current)
    _tell(opened, endpoint, json)
    if follow_s is not None:
        rollouts.follow(config, current, follow_s, roll_out)


def _tell(opened: Session, endpoint: Endpoint, json: bool) -> None:
    if json:
        print_json(dataclasses.asdict(endpoint))
        return
    out = opened.console
    out.print(f"{endpoint.model} answers on {endpoint.url} after {endpoint.seconds:.1f} s", highlight=False)
    out.print(curl_line(endpoint.url), soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _options_named() -> Iterator[None]:
    """What a setting refuses, an option does."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise _refused(error) from error


def checked_config(settings: dict[str, Any]) -> ServeConfig:
    """The settings as a ``ServeConfig``.

    Raises:
        ConfigError: the first one that is out of range, named as its option.
    """
    from serving.config import ServeConfig

    with _options_named():
        return ServeConfig.model_validate(settings)


def _refused(error: ValidationError) -> ConfigError:
    """The first of what is wrong, named as its option."""
    first = error.errors()[0]
    field = str(first["loc"][-1]) if first["loc"] else ""
    rule = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict) or not field:
        return ConfigError("These options do not fit together.", rule=rule)
    option = _OPTIONS.get(field, "--" + field.replace("_", "-"))
    return ConfigError(f"{option} is not valid.", value=first["input"], rule=rule)


def fitting_limits(max_steps: int, max_waiting_images: int) -> dict[str, int]:
    """What requests may ask for; defaults that nobody chose give way to what was chosen."""
    from serving.config import LimitConfig

    usual = LimitConfig()
    return {
        "max_steps": max_steps,
        "default_steps": min(usual.default_steps, max_steps),
        "max_images_per_request": min(usual.max_images_per_request, max_waiting_images),
    }


def curl_line(url: str) -> str:
    """A command that makes a picture without Darkroom."""
    body = '{"prompt": "a robot face, 3D"}'
    return (
        f"curl -s {url}/v1/images/generations -H 'content-type: application/json' -d '{body}'"
        " | python -c 'import sys,json,base64;"
        'sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\' > out.png'
    )


def _take_down(opened: Session, json: bool, beside: str | None) -> None:
    from cluster.stack import current, find, use

    stack = current(opened.home) or find(opened.home)
    removed = False
    if stack is not None:
        use(stack)
        from serving.deployment import undeploy
        from serving.deployment_models import withdraw_beside

        removed = undeploy(stack.dashboard_url) if beside is None else withdraw_beside(stack.dashboard_url, beside)
    if json:
        print_json({"removed": removed})
    else:
        say("The endpoint is down." if removed else "Nothing was deployed.")
