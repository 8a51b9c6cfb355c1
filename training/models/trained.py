"""Which of a network's weights are trained; the others are frozen, and nothing keeps or moves them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from training.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def trained_names(network: torch.nn.Module) -> frozenset[str]:
    """The names of the weights that require gradients."""
    return frozenset(name for name, parameter in network.named_parameters() if parameter.requires_grad)


def load_trained(network: torch.nn.Module, weights: Mapping[str, torch.Tensor], names: Collection[str]) -> None:
    """Take the trained weights by the network's own names; what is frozen stays.

    Args:
        network: a diffusers model, with an adapter or without.
        weights: whole tensors.
        names: of those that are trained.

    Raises:
        CheckpointError: the weights are another network's.
    """
    strange = sorted(set(weights) ^ set(names))
    if strange:
        raise CheckpointError(
            "The weights belong to another network.", value=strange[0], rule=f"the {len(names)} trained weights' names"
        )
    network.load_state_dict(dict(weights), strict=False)
