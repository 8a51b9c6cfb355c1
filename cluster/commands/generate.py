"""``darkroom generate``: a picture out of a model behind HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cluster.console import print_json, session
from training.errors import StackError, UsageError
from training.sampling_config import SAMPLERS

EXAMPLES = {
    "generate": (
        'darkroom generate "a robot face, 3D" -o out.png',
        'darkroom generate "a robot face, 3D" -o robot.webp --n 4 --seed 7 --steps 30 --guidance-scale 2',
        'darkroom generate "a robot face, 3D" --sampler dpmpp_2m --steps 12',
        'darkroom generate "a robot face, red" --image robot.png --strength 0.5 -o red.png',
        'darkroom generate "a hat" --image robot.png --mask hole.png -o hat.png',
        'darkroom generate "a cat" --url http://images.example:8000 --json',
    ),
}

OUTPUT_FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
"""What a file's ending asks the endpoint for."""


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The picture; .png, .webp or .jpg.")] = Path("out.png"),
    n: Annotated[int, typer.Option("--n", help="How many; with more than one, out-0.png, out-1.png, ...")] = 1,
    seed: Annotated[int | None, typer.Option(help="Makes the same picture again; drawn if missing.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strictly to follow the prompt; 1 is free.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help=f"How it is denoised: {', '.join(SAMPLERS)}; the endpoint's own by default.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.", show_default=False)] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A PNG; only where it is transparent may --image change.", show_default=False)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far --image may change: above 0, 1 forgets it; 0.75, with --mask 1.")
    ] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT, or what the model was trained at.")] = "auto",
    adapter: Annotated[str | None, typer.Option(help="A LoRA of the endpoint, by name.")] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's own by default.")] = None,
    url: Annotated[
        str | None, typer.Option(envvar="DARKROOM_URL", help="The endpoint; the local stack's by default.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.")] = 300.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Ask the endpoint for a picture, or to change one; say where it is and which seed makes it again."""
    opened = session(context)
    output_format = OUTPUT_FORMATS.get(out.suffix.lower())
    if output_format is None:
        raise UsageError("No such picture format.", value=out.name, rule="a known ending", options=list(OUTPUT_FORMATS))
    from serving.client import request_images

    body: dict[str, object] = {
        "prompt": prompt,
        "n": n,
        "size": size,
        "adapter": adapter,
        "model": model,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "sampler": sampler,
        "strength": strength,
        "output_format": output_format,
    }
    files = start_files(image, mask, strength)
    pictures = request_images(url or local_url(opened.home), body, files=files, timeout_s=timeout_s)
    paths = numbered(out, len(pictures))
    for path, picture in zip(paths, pictures, strict=True):
        write_whole(path, picture.file)
    if json:
        print_json([{"path": str(path), "seed": each.seed} for path, each in zip(paths, pictures, strict=True)])
        return
    for path, picture in zip(paths, pictures, strict=True):
        opened.console.print(f"{path}  seed {picture.seed}", soft_wrap=True, highlight=False, markup=False)


def start_files(image: Path | None, mask: Path | None, strength: float | None) -> dict[str, bytes]:
    """The files that are sent, by the field's name.

    Raises:
        UsageError: a mask or a strength of no picture, or a file that cannot be read.
    """
    if image is None:
        for option, value in (("--mask", mask), ("--strength", strength)):
            if value is not None:
                rule = "what it says of an --image"
                raise UsageError(f"{option} needs a picture.", value=str(value), rule=rule, mend="--image PICTURE")
        return {}
    named = {"image": image} if mask is None else {"image": image, "mask": mask}
    try:
        return {name: path.read_bytes() for name, path in named.items()}
    except OSError as error:
        raise UsageError("A picture cannot be read.", value=error.filename, rule=error.strerror) from error


def numbered(out: Path, count: int) -> Sequence[Path]:
    """``out`` for one picture; ``out-0``, ``out-1``, ... for several."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{index}") for index in range(count)]


def local_url(home: Path) -> str:
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


def write_whole(path: Path, content: bytes) -> None:
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
