"""Schedule-free AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from training.optim.groups import Named, grouped

if TYPE_CHECKING:
    import torch


class ScheduleFreeConfig(BaseModel):
    """Schedule-free AdamW (Defazio et al. 2024, algorithm 1), its authors' implementation.

    It averages the weights itself, and this average is what is evaluated and published: ``ema.decay`` is not used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["schedule_free"] = "schedule_free"
    """Chooses this optimizer."""
    learning_rate: float = Field(default=2.5e-3, gt=0)
    """The rate, usually 1 to 10 times AdamW's. A constant schedule's warm-up scales it."""
    beta1: float = Field(default=0.9, gt=0, lt=1)
    """How near to the average the gradients are taken."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""

    def build(self, named: Named, lr_scales: Mapping[str, float]) -> torch.optim.Optimizer:
        """The optimizer over named weights, whose rates are multiplied with ``lr_scales``."""
        from training.optim.schedule_free_steps import ScheduleFreeSteps

        optimizer = ScheduleFreeSteps(
            grouped(named, lr_scales, self.weight_decay),
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
        )
        optimizer.train()  # and so it stays: what is evaluated is computed beside, in ``Ema``
        return optimizer

    def fresh(self, tensor: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002  others differ by group
        """The state of a tensor before its first step, as the library would create it at that step."""
        import torch

        return {"z": tensor.detach().clone(), "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False)}
