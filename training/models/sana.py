"""Sana (Xie et al. 2024): diffusers' ``SanaTransformer2DModel``, of a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

    from training.conditioning import Conditioning


def apply_sana(
    sana: SanaTransformer2DModel, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The network contract over diffusers' signature. A variance that a network learned elsewhere is left out."""
    output: torch.Tensor = sana(
        x,
        encoder_hidden_states=conditioning.tokens,
        encoder_attention_mask=conditioning.mask,
        timestep=t * 1000.0 * sana.config["timestep_scale"],
    ).sample
    return output[:, : x.shape[1]]
