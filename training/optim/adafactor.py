"""Adafactor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from training.optim.groups import Named, grouped

if TYPE_CHECKING:
    import torch


class AdafactorConfig(BaseModel):
    """Adafactor (Shazeer and Stern 2018), torch's implementation: for a matrix it keeps one number per row and column.

    The means over rows and columns need the whole matrix, so it works without ZeRO's cutting only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adafactor"] = "adafactor"
    """Chooses this optimizer."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """The largest relative step; the paper's ``1/sqrt(step)`` bounds it later. The schedule scales it."""
    beta2_decay: float = Field(default=-0.8, lt=0)
    """The second moment's decay is ``1 - step**beta2_decay``."""
    epsilon: float = Field(default=1e-3, gt=0)
    """The smallest root mean square of a weight that steps are relative to."""
    clip: float = Field(default=1.0, gt=0)
    """Largest root mean square of an update."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""

    def build(self, named: Named, lr_scales: Mapping[str, float]) -> torch.optim.Optimizer:
        """The optimizer over named weights, whose rates are multiplied with ``lr_scales``."""
        import torch

        return torch.optim.Adafactor(
            grouped(named, lr_scales, self.weight_decay),
            lr=self.learning_rate,
            beta2_decay=self.beta2_decay,
            eps=(None, self.epsilon),
            d=self.clip,
        )

    def fresh(self, tensor: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002  others differ by group
        """The state of a tensor before its first step, as torch would create it at that step."""
        import torch

        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32)}
        if tensor.ndim < 2:
            return {**state, "variance": torch.zeros_like(tensor, requires_grad=False)}
        rows, columns = (*tensor.shape[:-1], 1), (*tensor.shape[:-2], 1, tensor.shape[-1])
        return {**state, "row_var": tensor.new_zeros(rows), "col_var": tensor.new_zeros(columns)}
