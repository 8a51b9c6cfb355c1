"""AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from training.optim.groups import Named, grouped

if TYPE_CHECKING:
    import torch


class AdamWConfig(BaseModel):
    """AdamW (Loshchilov and Hutter 2019), torch's fused implementation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adamw"] = "adamw"
    """Chooses this optimizer."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """The peak rate; the schedule scales it."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""

    def build(self, named: Named, lr_scales: Mapping[str, float]) -> torch.optim.Optimizer:
        """The optimizer over named weights, whose rates are multiplied with ``lr_scales``."""
        import torch

        return torch.optim.AdamW(
            grouped(named, lr_scales, self.weight_decay),
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            fused=True,
        )

    def fresh(self, tensor: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002  others differ by group
        """The state of a tensor before its first step, as torch would create it at that step."""
        import torch

        return {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
        }
