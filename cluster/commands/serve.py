"""``darkroom serve`` and ``darkroom generate``: a model behind HTTP, and a picture out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.console import Session, print_json, say, session
from training.errors import ConfigError, StackError, UsageError

if TYPE_CHECKING:
    from serving.config import ServeConfig

EXAMPLES = {
    "serve": (
        "darkroom serve emoji@champion",
        "darkroom serve emoji/3 --port 8000 --min-replicas 2 --max-replicas 8",
        "darkroom serve path/to/bundle --json",
        "darkroom serve --down",
    ),
    "generate": (
        'darkroom generate "a robot face, 3D" -o out.png',
        'darkroom generate "a robot face, 3D" -o robot.webp --n 4 --seed 7 --steps 30 --guidance-scale 2',
        'darkroom generate "a cat" --url http://images.example:8000 --json',
    ),
}

OUTPUT_FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
"""What a file's ending asks the endpoint for."""

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


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The picture; .png, .webp or .jpg.")] = Path("out.png"),
    n: Annotated[int, typer.Option("--n", help="How many; with more than one, out-0.png, out-1.png, ...")] = 1,
    seed: Annotated[int | None, typer.Option(help="Makes the same picture again; drawn if missing.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strictly to follow the prompt; 1 is free.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT, or what the model was trained at.")] = "auto",
    model: Annotated[str | None, typer.Option(help="The endpoint's own by default.")] = None,
    url: Annotated[
        str | None, typer.Option(envvar="DARKROOM_URL", help="The endpoint; the local stack's by default.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.")] = 300.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Ask the endpoint for a picture, and say where it is and which seed makes it again."""
    opened = session(context)
    output_format = OUTPUT_FORMATS.get(out.suffix.lower())
    if output_format is None:
        raise UsageError("No such picture format.", value=out.name, rule="a known ending", options=list(OUTPUT_FORMATS))
    from serving.client import request_images

    body: dict[str, object] = {
        "prompt": prompt,
        "n": n,
        "size": size,
        "model": model,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "output_format": output_format,
    }
    pictures = request_images(url or _local_url(opened.home), body, timeout_s=timeout_s)
    paths = numbered(out, len(pictures))
    for path, picture in zip(paths, pictures, strict=True):
        _write(path, picture.file)
    if json:
        print_json([{"path": str(path), "seed": each.seed} for path, each in zip(paths, pictures, strict=True)])
        return
    for path, picture in zip(paths, pictures, strict=True):
        opened.console.print(f"{path}  seed {picture.seed}", soft_wrap=True, highlight=False, markup=False)


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


def numbered(out: Path, count: int) -> Sequence[Path]:
    """``out`` for one picture; ``out-0``, ``out-1``, ... for several."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{index}") for index in range(count)]


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


def _local_url(home: Path) -> str:
    """The endpoint of the local stack.

    Raises:
        StackError: no stack runs under ``home``.
    """
    from cluster.stack import find

    stack = find(home)
    if stack is None:
        raise StackError(
            "There is no endpoint to ask: no local stack runs.",
            value=str(home),
            rule="a stack with a served model, or --url",
            mend="darkroom serve NAME@champion, or give --url of an endpoint that runs",
        )
    return f"http://127.0.0.1:{stack.serve_port}"


def _write(path: Path, content: bytes) -> None:
    """The whole file or nothing."""
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(
            "The picture cannot be written.", value=str(path), rule=error.strerror, mend="choose another --out"
        ) from error
