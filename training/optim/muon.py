"""Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from training.errors import ConfigError
from training.optim.groups import Named, grouped

if TYPE_CHECKING:
    import torch


class MuonConfig(BaseModel):
    """Muon (Jordan et al. 2024) for the matrices of linear layers, AdamW for everything else.

    A matrix's update is its momentum, made orthogonal, and sized as AdamW's updates are (Liu et al. 2025, "Muon is
    scalable for LLM training", eq. 4), so that one learning rate serves both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["muon"] = "muon"
    """Chooses this optimizer."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """The peak rate of both; the schedule scales it."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the matrices' momentum (Nesterov's)."""
    iterations: int = Field(default=5, ge=1, le=12)
    """Newton-Schulz iterations towards an orthogonal matrix."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of both."""
    adamw: tuple[str, ...] = ("embed", "proj_out", "class_")
    """Matrices whose name contains one of these are AdamW's: tables, and layers from and to the data."""

    def build(self, named: Named, lr_scales: Mapping[str, float]) -> torch.optim.Optimizer:
        """The optimizer over named weights, whose rates are multiplied with ``lr_scales``.

        Raises:
            ConfigError: there is no matrix for Muon.
        """
        from training.optim.muon_steps import MuonSteps

        weights = list(named)
        matrices = [(name, weight) for name, weight in weights if self.takes(name, weight)]
        if not matrices:
            raise ConfigError(
                "Muon has nothing to do: the network has no matrix of a linear layer for it.",
                value=self.adamw,
                rule="optimizer.adamw leaves at least one two-dimensional weight",
                options=["adamw"],
            )
        rest = [(name, weight) for name, weight in weights if not self.takes(name, weight)]
        return MuonSteps(
            [
                *grouped(matrices, lr_scales, self.weight_decay, muon=True),
                *grouped(rest, lr_scales, self.weight_decay, muon=False),
            ],
            {
                "lr": self.learning_rate,
                "momentum": self.momentum,
                "iterations": self.iterations,
            },
            {"betas": (self.beta1, self.beta2), "eps": self.epsilon, "fused": True},
        )

    def takes(self, name: str, weight: torch.Tensor) -> bool:
        """Whether a weight is Muon's."""
        shape = tuple(getattr(weight, "ds_shape", weight.shape))
        return len(shape) == 2 and min(shape) > 1 and not any(part in name for part in self.adamw)

    def fresh(self, tensor: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a tensor before its first step."""
        import torch

        if group["muon"]:
            return {"momentum": torch.zeros_like(tensor, requires_grad=False)}
        return {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
        }
