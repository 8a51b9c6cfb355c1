"""When and where a run's state is kept."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CheckpointConfig(BaseModel):
    """When and where the run's state is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = None
    """A folder or URL (``s3://bucket/folder``) that all nodes reach; each run has a folder of its own in it, named as
    its run folder and the one above. None is ``checkpoints`` in the run's folder."""
    every_steps: int = Field(default=100, ge=1)
    """Steps between two checkpoints; the last step and an interruption are always kept."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept."""
    keep_best: int = Field(default=0, ge=0)
    """How many of those with the lowest ``best_metric`` are kept besides."""
    best_metric: str = "held_out_loss"
    """A metric of the evaluations; a checkpoint has it where its step was evaluated."""
    memory_every_steps: int = Field(default=1, ge=0)
    """Steps between two copies into the memory of each rank's node, from which a run goes on after one of its
    processes was killed; 0 makes none."""
