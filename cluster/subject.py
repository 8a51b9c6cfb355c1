"""What the demo shows: whose pictures, under which name, in which folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import DarkroomError, DataError, UsageError

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.data.manifest import Manifest

PACKAGED = "smileys"
"""The packaged pictures' data set."""

_ENDINGS = re.compile(r"(\.(tar|gz|tgz|bz2|xz|zst|zip|jsonl|csv))+$", re.IGNORECASE)
_MAX_LENGTH = 60
"""Of a name that is made here; sweeps and trials append to it."""


def recipe(home: Path, source: Path | None, reference: str, assignments: Sequence[str]) -> TrainConfig:
    """The demo's recipe, its paths absolute.

    Pictures of one's own name the run and its data set, unless ``--set name=`` does: two sources share neither.

    Args:
        home: holds the data sets.
        source: pictures of one's own; None for the packaged ones.
        reference: a packaged recipe's name or a YAML file.
        assignments: ``section.key=value`` pairs.

    Raises:
        ConfigError: the recipe is not valid.
    """
    from cluster import pipeline
    from training.config import load_recipe, parse

    values = load_recipe(reference, ["data.path=''", *assignments]).model_dump(mode="json")
    given = {assignment.partition("=")[0].strip() for assignment in assignments}
    if source is not None and "name" not in given:
        values["name"] = slug(source)
    if "data.path" not in given:
        values["data"]["path"] = str(home / "data" / (PACKAGED if source is None else values["name"]))
    return pipeline.resolve(parse(values, source=reference))


def slug(source: Path) -> str:
    """A run's name from the place of its pictures: ``My pics.tar.gz`` makes ``My-pics``, ``.`` the folder's name."""
    name = source.resolve().name
    name = name if source.is_dir() else _ENDINGS.sub("", name)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_MAX_LENGTH].strip("-._")
    # an override `name=2024` or `name=1e3` would be read as a number
    return name if re.search(r"[A-Za-z]", name) and not _is_number(name) else f"pictures-{name}".rstrip("-")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def build(source: Path | None, out: Path) -> Manifest:
    """Build the data set, or find it finished.

    Raises:
        DataError: as ``training.data.build.build``, with options that the demo has.
        UsageError: likewise.
    """
    from training.data.build import BuildConfig
    from training.data.build import build as build_dataset

    pictures = source or _packaged()
    try:
        return build_dataset(pictures, out, BuildConfig())
    except (DataError, UsageError) as error:
        raise _explained(error, source, pictures, out) from error


def _packaged() -> Path:
    import training.data

    return Path(training.data.__path__[0]) / "demo" / f"{PACKAGED}.tar"


def _explained(error: DarkroomError, source: Path | None, pictures: Path, out: Path) -> DarkroomError:
    """The error with what can be done about it here; `darkroom data build` has other options than the demo."""
    options, mend = list(error.options), error.mend
    if error.value == str(out):  # it is the folder that does not fit
        options = [*(["--set name=OTHER"] if source else []), "--set data.path=FOLDER"]
        mend = f"darkroom data build {pictures} {out} --force replaces it" if isinstance(error, DataError) else None
    elif "--" in (mend or ""):
        mend = (
            "mend the pictures, or go step by step with `darkroom data build` and `darkroom train`, which have options"
        )
    return type(error)(error.message, value=error.value, rule=error.rule, options=options, mend=mend)
