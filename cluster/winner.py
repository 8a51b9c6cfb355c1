"""The winner of the demo's sweep: searched for once, and kept as soon as a run has begun with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from cluster.pipeline import Place, data_hash
from training.errors import CheckpointError

if TYPE_CHECKING:
    from training.config import TrainConfig


def kept(place: Place, config: TrainConfig, searched: Collection[str]) -> dict[str, Any] | None:
    """The searched values that the run of this name has begun with; None when it has no checkpoint.

    Another winner could not go on from that checkpoint, so a later sweep must not choose one.

    Args:
        place: where the run is.
        config: the recipe before the sweep.
        searched: dotted paths of the fields that the sweep sets.

    Raises:
        CheckpointError: the run has begun with another recipe or data set, and can never go on with these.
    """
    from training import checkpoint
    from training.config import EXACT

    found, _ = checkpoint.newest(checkpoint.place(config.checkpoint, place.run_dir(config.name)), contents=False)
    if found is None:
        return None
    before, now = _fields(found.about["config"], EXACT), _fields(config.model_dump(mode="json"), EXACT)
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in searched and before.get(key) != now.get(key)
    ]
    if found.about["data_hash"] != data_hash(config):
        changed.append(f"the pictures in {config.data.path} have changed")
    if changed:
        raise CheckpointError(
            f"The run {config.name} has begun with something else, and cannot go on with this.",
            value="; ".join(changed),
            rule=f"recipe and data set as in {found.path}",
            options=("--set name=OTHER begins a run beside it", "the recipe and the pictures that it began with"),
        )
    return {key: before[key] for key in searched}


def _fields(recipe: Mapping[str, Any], sections: Collection[str]) -> dict[str, Any]:
    """The named sections' values by dotted path."""
    flat: dict[str, Any] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{path}.{key}", inner)
        else:
            flat[path] = value

    for section in sections:
        value: Any = recipe
        for key in section.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        add(section, value)
    return flat
