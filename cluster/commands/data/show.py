"""``darkroom data show``: what a data set holds, and a contact sheet of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.data.printing import print_json, print_table, printable_path
from cluster.console import say

if TYPE_CHECKING:
    from training.data.dataset import Dataset
    from training.errors import DataError

EXAMPLES = """Examples:

darkroom data show data/cats --verify

darkroom data show s3://bucket/cats --sheet cats.png
"""

_SHEET_PICTURES = 64
_CELL_PX = 96
_NAMED = 5
"""Unreadable pictures that a warning names."""


def show(
    dataset: Annotated[str, typer.Argument(metavar="DATA", help="A data set that `darkroom data build` made.")],
    sheet: Annotated[
        Path | None, typer.Option(help="The contact sheet's file, a PNG; DATA/contact_sheet.png if not given.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its checksum.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Print what a data set holds, and write a contact sheet of it.

    DATA is a folder or a URL; of a data set behind a network, a contact sheet is made only with --sheet.
    """
    from training.data.dataset import Dataset
    from training.data.output import CONTACT_SHEET
    from training.data.storage import Folder
    from training.errors import DataError

    place = Folder.at(dataset)
    folder = place.local if place.local is not None and place.local.is_dir() else None
    opened = Dataset.open(dataset)
    if verify:
        opened.verify()
    if not as_json:
        print_table(dataset, opened.manifest)
    target = sheet or (folder and folder / CONTACT_SHEET)
    made = _Sheet(None, []) if target is None else _write_sheet(opened, target)
    if as_json:
        written = None if made.path is None else str(made.path)
        found = {"path": dataset, "contact_sheet": written, "unreadable": made.unreadable}
        print_json({**found, "manifest": opened.manifest.model_dump()})
    elif made.path is not None:
        typer.echo(f"Contact sheet: {printable_path(made.path)}")
    if made.unreadable:
        raise DataError(
            f"{len(made.unreadable)} pictures of the data set cannot be read.",
            value="; ".join(made.unreadable[:_NAMED]),
            mend="--verify names the damaged files; `darkroom data build` makes them again with --force",
        )
    if made.failure is None:
        return
    if (
        sheet is None and folder is not None and not os.access(folder, os.W_OK)
    ):  # a data set that is only read is nothing wrong
        say(f"No contact sheet: {printable_path(dataset)} cannot be written; --sheet PATH puts it elsewhere.")
        return
    raise made.failure


@dataclass(frozen=True)
class _Sheet:
    """A contact sheet's file, if there is one; what could not be read for it; why it could not be written."""

    path: Path | None
    unreadable: list[str]
    failure: DataError | None = None


def _write_sheet(dataset: Dataset, path: Path) -> _Sheet:
    """A contact sheet of pictures spread evenly over the training split; failures are returned: they are told last."""
    import numpy as np
    from PIL import Image

    from training.errors import DataError, StorageError
    from training.evaluate.contact_sheet import contact_sheet

    split = dataset.split("train")
    pictures: list[Image.Image] = []
    captions: list[str] = []
    unreadable: list[str] = []
    for index in np.linspace(0, len(split) - 1, min(_SHEET_PICTURES, len(split))).astype(int).tolist():
        try:
            picture, fields = split.picture(index)
        except (DataError, StorageError) as error:
            unreadable.append(f"train[{index}]: {error.rule}")
            continue
        picture.thumbnail((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)  # 64 of full size would fill the memory
        pictures.append(picture)
        captions.append(str(fields["caption"]))
    if not pictures:
        return _Sheet(None, unreadable)
    try:
        contact_sheet(pictures, captions, cell_px=_CELL_PX).save(path, "PNG")
    except OSError as error:
        message, mend = "The contact sheet cannot be written.", "--sheet PATH puts it elsewhere"
        return _Sheet(None, unreadable, DataError(message, value=str(path), rule=error.strerror, mend=mend))
    return _Sheet(path, unreadable)
