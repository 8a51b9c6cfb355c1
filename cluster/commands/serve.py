"""``darkroom serve``: a model behind HTTP."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.console import Session, print_json, say, session
from training.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from serving.config import ServeConfig

EXAMPLES = {
    "serve": (
        "darkroom serve emoji@champion",
        "darkroom serve emoji/3 --port 8000 --min-replicas 2 --max-replicas 8",
        "darkroom serve path/to/bundle --json",
        "darkroom serve --down",
    ),
}

_OPTIONS = {"deploy_timeout_s": "--timeout", "graceful_shutdown_timeout_s": "--drain-timeout"}
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
    target_ongoing_requests: Annotated[float, typer.Option(help="Requests in flight per replica to scale to.")] = 4.0,
    max_batch_rows: Annotated[int, typer.Option(help="Rows denoised in one step; a guided image takes two.")] = 8,
    padded_rows: Annotated[int, typer.Option(help="Rows of one call of the network, always full.")] = 2,
    max_waiting_images: Annotated[int, typer.Option(help="Images that may wait before requests are refused.")] = 64,
    max_steps: Annotated[int, typer.Option(help="Largest num_inference_steps.")] = 100,
    replica_cpus: Annotated[float, typer.Option(help="CPUs that Ray reserves per replica.")] = 0.1,
    replica_gpus: Annotated[float, typer.Option(help="GPUs that Ray reserves per replica.")] = 0.0,
    replica_threads: Annotated[int, typer.Option(help="Threads of a replica's tensor operations.")] = 1,
    drain_timeout_s: Annotated[
        float, typer.Option("--drain-timeout", help="Seconds that a stopping replica has to finish its requests.")
    ] = 120.0,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds until it must be up.")] = 180.0,
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
        _take_down(opened, json)
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
    }
    config = checked_config(settings)
    from serving.deployment import deploy

    endpoint = deploy(stack.dashboard_url, config, say)
    if json:
        print_json(dataclasses.asdict(endpoint))
        return
    out = opened.console
    out.print(f"{endpoint.model} answers on {endpoint.url} after {endpoint.seconds:.1f} s", highlight=False)
    out.print(curl_line(endpoint.url), soft_wrap=True, highlight=False, markup=False)


def checked_config(settings: dict[str, Any]) -> ServeConfig:
    """The settings as a ``ServeConfig``.

    Raises:
        ConfigError: the first one that is out of range, named as its option.
    """
    from pydantic import ValidationError

    from serving.config import ServeConfig

    try:
        return ServeConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][-1]) if first["loc"] else ""
        rule = first["msg"].removeprefix("Value error, ")
        if isinstance(first["input"], dict) or not field:
            raise ConfigError("These options do not fit together.", rule=rule) from error
        option = _OPTIONS.get(field, "--" + field.replace("_", "-"))
        raise ConfigError(f"{option} is not valid.", value=first["input"], rule=rule) from error


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


def _take_down(opened: Session, json: bool) -> None:
    from cluster.stack import current, find, use

    stack = current(opened.home) or find(opened.home)
    removed = False
    if stack is not None:
        use(stack)
        from serving.deployment import undeploy

        removed = undeploy(stack.dashboard_url)
    if json:
        print_json({"removed": removed})
    else:
        say("The endpoint is down." if removed else "Nothing was deployed.")
