"""Where a run begins: alone, and from its newest whole checkpoint where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training import checkpoint, run_lock
from training.config import EXACT, TrainConfig
from training.errors import CheckpointError


def begin(
    config: TrainConfig,
    run_dir: Path,
    data_hash: str,
    *,
    warn: Callable[[str], None],
    give_up: Callable[[], bool],
) -> checkpoint.Checkpoint | None:
    """Become the run's only writer, and find where it goes on. For rank 0, whose choice is that of all ranks.

    Args:
        config: the recipe.
        run_dir: the run's folder.
        data_hash: the data set's name.
        warn: takes what the user should know.
        give_up: asked while this waits for a predecessor; True ends the wait.

    Returns:
        None for a fresh run, and after ``give_up``.

    Raises:
        TrainingError: another process trains the run.
        CheckpointError: the run began with another recipe or data set.
    """
    if run_lock.hold(run_dir, on_wait=warn, give_up=give_up) is None:
        return None
    found, refused = checkpoint.newest(run_dir / "checkpoints")
    for reason in refused:
        warn(f"A checkpoint was passed over. {reason}")
    if found is None:
        return None
    _check_recipe(found, config, warn)
    if found.about["data_hash"] != data_hash:
        raise CheckpointError(
            "The run was trained on another data set.",
            value=data_hash,
            rule=f"data hash {found.about['data_hash']}, as in {found.path}",
            mend="give the run another name: a data set that was built again, or that `darkroom data forget` has"
            " changed, is another one; or give it the data set that it began with",
        )
    return found


def _check_recipe(found: checkpoint.Checkpoint, config: TrainConfig, warn: Callable[[str], None]) -> None:
    """What shapes the weights must be as it was; how and where it is computed may change."""
    before, now = found.about["config"], config.model_dump(mode="json")
    for section in changed(before, now):
        raise CheckpointError(
            f"The run {config.name} began with another recipe: {section} has changed.",
            value=_at(now, section),
            rule=f"{section} as in {found.path}: {_at(before, section)}",
            mend="give the run another name with --set name=..., or the recipe that it began with",
        )
    if before["steps"] != now["steps"] and config.schedule.kind != "constant":
        warn(f"The learning rate was laid out for {before['steps']} steps and is now for {now['steps']}.")


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The sections and fields of ``EXACT`` in which two recipes differ."""
    return [section for section in EXACT if _at(before, section) != _at(now, section)]


def _at(values: Any, path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
