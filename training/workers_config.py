"""What a recipe says of Ray Train's workers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class WorkersConfig(BaseModel):
    """Ray Train's worker group: of a fixed size, or as large as the cluster has room for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int | None = Field(default=None, ge=1)
    """Training processes, one per worker; 1 unless told. With ``min`` and ``max`` there is no fixed number."""
    min: int | None = Field(default=None, ge=1)
    """The fewest workers that the run goes on with."""
    max: int | None = Field(default=None, ge=1)
    """The most workers, which the run has wherever the cluster has room."""
    resize_every_s: float = Field(default=60.0, gt=0)
    """How often an elastic run looks whether the cluster has room for another number of workers. Each change costs a
    checkpoint and a start of the group."""
    cpus: float = Field(default=0.9, gt=0)
    """Ray CPUs that a worker reserves. Below 1, so that two workers and a sweep's driver fit on two cores."""
    gpus: float = Field(default=0.0, ge=0)
    """Ray GPUs that a worker reserves."""
    threads: int = Field(default=1, ge=1)
    """torch's threads in each training process."""
    max_failures: int = Field(default=3, ge=0)
    """How often in a row training processes are replaced without a new step, and how often a lost worker is."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        told = {key: value for key, value in values.items() if value is not None or key not in ("count", "min", "max")}
        return told if {"min", "max"} & told.keys() else {"count": 1, **told}

    @model_validator(mode="after")
    def _one_of_both(self) -> WorkersConfig:
        if self.count is not None and (self.min is not None or self.max is not None):
            raise ValueError("either count, a fixed number of workers, or min and max; count=null takes count away")
        if self.count is None and (self.min is None or self.max is None):
            raise ValueError("min and max come together: the fewest and the most workers")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} must be at most max {self.max}")
        return self

    @property
    def elastic(self) -> bool:
        """Whether the number of workers follows the cluster's room."""
        return self.count is None

    @property
    def smallest(self) -> int:
        """The fewest workers of a group."""
        return self.count or self.min or 1

    @property
    def largest(self) -> int:
        """The most workers of a group."""
        return self.count or self.max or 1
