"""Snapshots of the tracked averages beside a run's checkpoints, and the average of another length made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.checkpoint import found_in
from training.checkpoint.config import CheckpointConfig
from training.checkpoint.stored import Checkpoint
from training.data.storage import Folder
from training.ema import EmaConfig, PostHocConfig, group_of
from training.ema_post_hoc import Snapshot, coefficients
from training.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from training.checkpoint.keeper import Where
    from training.checkpoint.writer import Writer
    from training.engine_state import Part

FOLDER = "averages"
"""In the run's folder."""
_ALL = CheckpointConfig(keep=10**9)


class Snapshots:
    """Writes them, beside the steps. One for each rank.

    Args:
        config: which lengths and how often; None keeps none.
        steps: of the run.
        run_dir: the run's folder.
        where: which attempt and process.
    """

    def __init__(self, config: PostHocConfig | None, steps: int, run_dir: Path, where: Where) -> None:
        self._config, self._steps = config, steps
        self._of = (Folder.at(run_dir / FOLDER), _ALL, where.token, where.rank, where.world)
        self._writer: Writer | None = None

    def keep(self, done: int, tracked: Sequence[Part]) -> None:
        """After ``done`` steps, where a snapshot is due. Every rank calls it.

        The run's end is always kept, and is in storage when this returns.

        Args:
            done: steps done.
            tracked: the average's ``tracked``.

        Raises:
            StorageError: it, or the one before, cannot be written.
        """
        from training.checkpoint.slab import Packer, Slab
        from training.checkpoint.writer import Save, Writer

        last = done == self._steps
        if self._config is None or (not last and done % self._config.every_steps):
            return
        layout, values = Packer().values(tracked)
        slab = Slab(layout)
        slab.fill(values, {})
        self._writer = self._writer or Writer(*self._of)
        about = {"lengths": list(self._config.lengths)}
        self._writer.begin(Save(done, 0, slab, {}, about, first=_nothing, release=_nothing))
        if last:
            self.close()

    def close(self) -> None:
        """Nothing more is kept; a snapshot that is being written is waited for. Every rank calls it.

        Raises:
            StorageError: it cannot be written.
        """
        if self._writer is not None:
            self._writer.wait()
            self._writer.close()
            self._writer = None


def reconstruct(run_dir: Path, length: float, step: int | None = None) -> dict[str, torch.Tensor]:
    """The average of a length, made of a run's snapshots.

    Args:
        run_dir: the run's folder.
        length: its relative standard deviation, above 0 and below 0.28.
        step: as it was at the last snapshot up to this one; None is the end.

    Returns:
        Whole fp32 tensors by the trained module's names.

    Raises:
        CheckpointError: there are no snapshots, or one is damaged.
    """
    kept = [found for found in _whole(run_dir / FOLDER) if step is None or found.step <= step]
    if not kept:
        raise CheckpointError("No snapshot is that old.", value=step, rule=f"snapshots up to that step in {run_dir}")
    last = kept[-1].step
    pairs = [(found, past) for found in kept for past in found.about["lengths"]]
    factors = coefficients([Snapshot(found.step, past) for found, past in pairs], Snapshot(last, length))
    total: dict[str, torch.Tensor] = {}
    for (found, past), factor in zip(pairs, factors, strict=True):
        for name, tensor in found.load(group_of(past)).items():
            share = tensor.double() * float(factor)
            total[name] = total[name] + share if name in total else share
    return {name: tensor.float() for name, tensor in total.items()}


def published_average(config: EmaConfig, run_dir: Path, found: Checkpoint) -> dict[str, torch.Tensor]:
    """The averaged weights that a recipe publishes of a checkpoint, by the trained module's names.

    Raises:
        CheckpointError: they are to be of another length, and the snapshots are missing or damaged.
    """
    if config.publish_length is None:
        return found.load("ema")
    return reconstruct(run_dir, config.publish_length, found.step)


def _whole(folder: Path) -> list[Checkpoint]:
    """Every snapshot, the first first. A damaged one would be missed without a trace in the sum: it is refused."""
    kept: list[Checkpoint] = []
    for found in found_in(Folder.at(folder)) if folder.is_dir() else ():
        if isinstance(found, CheckpointError):
            raise found
        found.check()
        kept.append(found)
    if not kept:
        raise CheckpointError(
            "The run has no snapshots of its averages.",
            value=str(folder),
            rule="at least one, which a recipe with ema.post_hoc writes",
            mend="train with --set ema.post_hoc.every_steps=500",
        )
    return sorted(kept, key=lambda found: found.step)


def _nothing() -> None:
    """A snapshot's memory is its own, and nothing has to be written before it."""
