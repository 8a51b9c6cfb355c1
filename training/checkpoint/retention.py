"""Which checkpoints go when another one has been written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from training.checkpoint import manifest
from training.checkpoint.config import CheckpointConfig
from training.checkpoint.vault import step_name
from training.data.storage import Folder
from training.errors import CheckpointError


def dropped(folder: Folder, steps: Sequence[int], newest: int, config: CheckpointConfig) -> list[int]:
    """The steps whose checkpoints go.

    A later step than the one just written is damaged, or of a future that the run has left: it went on from an
    earlier one. Of the others the newest ``keep`` stay, and the best ``keep_best``.

    Args:
        folder: where the checkpoints lie.
        steps: all that are there.
        newest: the step just written.
        config: how many stay.

    Raises:
        StorageError: storage does not answer.
    """
    ours = sorted((step for step in steps if step <= newest), reverse=True)
    kept = set(ours[: config.keep])
    if config.keep_best and len(ours) > config.keep:
        measured = [(_metric(folder, step, config.best_metric), -step) for step in ours]
        best = sorted(pair for pair in measured if not math.isnan(pair[0]))
        kept |= {-step for _, step in best[: config.keep_best]}
    return [step for step in steps if step not in kept]


def _metric(folder: Folder, step: int, name: str) -> float:
    """What a checkpoint's manifest says was measured; NaN where it says nothing."""
    place = f"{step_name(step)}/{manifest.NAME}"
    try:
        return manifest.parse(folder.read(place), folder.url(place)).metrics.get(name, math.nan)
    except (FileNotFoundError, CheckpointError):
        return math.nan
