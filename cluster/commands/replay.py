"""``darkroom replay``: a picture made again from what it says of itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.generate import local_url, write_whole
from cluster.console import print_json, session
from training.errors import UsageError

if TYPE_CHECKING:
    from serving.replay import Comparison

EXAMPLES = {
    "replay": (
        "darkroom replay picture.png",
        "darkroom replay picture.png --check",
        "darkroom replay picture.png --url http://images.example:8000 -o again.png",
        "darkroom replay picture.webp --bundle path/to/bundle --check --json",
        "darkroom replay hat.png --image robot.png --mask hole.png",
    ),
}


def replay(
    context: typer.Context,
    picture: Annotated[Path, typer.Argument(help="A picture that Darkroom made: .png, .webp or .jpg.")],
    url: Annotated[
        str | None, typer.Option(envvar="DARKROOM_URL", help="The endpoint; the local stack's by default.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Make it here with this model's directory, and ask no endpoint.", show_default=False),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="What an edit was made from.", show_default=False)] = None,
    mask: Annotated[Path | None, typer.Option(help="The edit's mask, where it had one.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The new picture; PICTURE-again by default.", show_default=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail unless every pixel is the same.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for an endpoint's answer.")] = 300.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Make a picture again from its own parameters, and say whether every bit is the same or what differs."""
    opened = session(context)
    before = _read(picture)
    from serving.replay import compare, read_parameters, read_start, replay_here, replay_there

    parameters = read_parameters(before)
    start = read_start(parameters, *(None if path is None else _read(path) for path in (image, mask)))
    if bundle is not None:
        after = replay_here(bundle, parameters, start)
    else:
        after = replay_there(url or local_url(opened.home), parameters, start, timeout_s=timeout_s)
    found = compare(before, after)
    path = out or (None if check else picture.with_stem(f"{picture.stem}-again"))
    if path is not None:
        write_whole(path, after)
    if json:
        print_json({"path": path, "model": parameters.model, "seed": parameters.seed, **dataclasses.asdict(found)})
    else:
        for line in _told(path or picture, found):
            opened.console.print(line, soft_wrap=True, highlight=False, markup=False)
    if check and not found.bit_equal:
        raise typer.Exit(1)


def _told(path: Path, found: Comparison) -> list[str]:
    """One line of how it went, then one for each thing that was not as it was then."""
    if found.bit_equal:
        return [f"{path}  bit-equal"]
    share = f"{found.differing_pixels} of {found.pixels} pixels"
    far = f"by at most {found.max_difference} of 255 levels"
    return [
        f"{path}  differs in {share}, {far}, PSNR {found.psnr_db:.1f} dB",
        *(f"  {cause}" for cause in found.causes),
    ]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError("The picture cannot be read.", value=str(path), rule=error.strerror) from error
