"""What a recipe says of steps that go wrong and of ranks that stand still."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class GuardsConfig(BaseModel):
    """What happens when a step cannot be trusted, or none comes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradient that is not finite: ``stop`` ends the run before a checkpoint is made of it; ``skip`` undoes
    the step and leaves its batch out; ``rewind`` goes back to the newest durable checkpoint's state and leaves out
    the batches since (Chowdhery et al. 2022, section 5.1)."""
    on_spike: Literal["ignore", "stop", "skip", "rewind"] = "ignore"
    """The same for a loss or gradient norm far above the recent ones."""
    spike_deviations: float = Field(default=8.0, gt=0)
    """A spike is so many standard deviations above the median of the recent logarithms; the deviation is told from
    the median absolute deviation, which outliers do not move."""
    spike_factor: float = Field(default=3.0, gt=1)
    """And at least so many times the median itself, for a calm run has next to no deviation."""
    spike_window: int = Field(default=100, ge=10, le=1000)
    """How many trusted steps are recent. Until there are as many, nothing is a spike."""
    most_in_a_row: int = Field(default=3, ge=1)
    """Steps skipped and rewinds, before the run stops; ``calm_steps`` trusted steps begin the count anew."""
    calm_steps: int = Field(default=20, ge=1)
    """Trusted steps after which an earlier fault counts no more."""
    stall_s: float = Field(default=600.0, gt=0)
    """Seconds without progress of a rank after which the stacks of all ranks go into their logs."""
    long_stall_s: float = Field(default=3600.0, gt=0)
    """The same, where it is longer, for what takes long by itself: the first step of a process, which may compile the
    network, evaluations, and checkpoints that are waited for."""
    on_stall: Literal["warn", "restart"] = "warn"
    """``warn`` tells which rank waits where, and goes on waiting; ``restart`` ends the processes as well, and the run
    goes on from its newest state as after any other failure."""

    @property
    def undoes_steps(self) -> bool:
        """Whether the state before a step must be at hand."""
        return "skip" in (self.on_nonfinite, self.on_spike)


def check_undo(guards: GuardsConfig, memory_every_steps: int) -> None:
    """Refuse to skip where the state before a step is not kept.

    Raises:
        ValueError: for pydantic to tell.
    """
    if guards.undoes_steps and memory_every_steps != 1:
        name = "on_nonfinite" if guards.on_nonfinite == "skip" else "on_spike"
        raise ValueError(
            f"guards.{name} skip goes back by one step and needs checkpoint.memory_every_steps 1, not"
            f" {memory_every_steps}; rewind and stop need none"
        )
