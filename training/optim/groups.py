"""Weights by the learning rate and the decay that they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Named = Iterable[tuple[str, "torch.nn.Parameter"]]
"""Weights with their names."""


def grouped(named: Named, lr_scales: Mapping[str, float], weight_decay: float, **shared: Any) -> list[dict[str, Any]]:
    """Parameter groups, one for each factor of the learning rate, in the order of their first weight.

    A step takes ``rate * weight_decay`` of a weight away. Where the rate is scaled, the decay is divided by the same
    factor, so that this share is that of every other weight: it decides how long a weight remembers, which does not
    depend on the width (Wang and Aitchison 2024, "How to set AdamW's weight decay as you scale model and dataset
    size").

    Args:
        named: the weights.
        lr_scales: factors by name; 1 where a name is missing.
        weight_decay: decoupled, of a weight whose factor is 1.
        shared: what each group has besides.
    """
    groups: dict[float, dict[str, Any]] = {}
    for name, weight in named:
        scale = lr_scales.get(name, 1.0)
        fresh = {"params": [], "lr_scale": scale, "weight_decay": weight_decay / scale, **shared}
        groups.setdefault(scale, fresh)["params"].append(weight)
    return list(groups.values())
