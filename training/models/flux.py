"""FLUX (Black Forest Labs 2024): diffusers' ``FluxTransformer2DModel``, of a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    from training.conditioning import Conditioning

_GUIDANCE = 3.5
"""What a network that was distilled from guided ones is told: the default of diffusers' pipeline."""


def apply_flux(
    flux: FluxTransformer2DModel, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The network contract over diffusers' signature: squares of 2 x 2 values are tokens, with their places beside."""
    import torch

    rows, channels, height, width = x.shape
    down, across = height // 2, width // 2
    squares = x.reshape(rows, channels, down, 2, across, 2).permute(0, 2, 4, 1, 3, 5)
    places = torch.zeros(down, across, 3, device=x.device)
    places[..., 1] = torch.arange(down, device=x.device)[:, None]
    places[..., 2] = torch.arange(across, device=x.device)
    output = flux(
        hidden_states=squares.reshape(rows, down * across, channels * 4),
        encoder_hidden_states=conditioning.tokens,
        pooled_projections=conditioning.summary(),
        timestep=t,  # it multiplies by 1000 itself
        img_ids=places.reshape(-1, 3),
        txt_ids=torch.zeros(conditioning.tokens.shape[1], 3, device=x.device),
        guidance=torch.full_like(t, _GUIDANCE) if flux.config["guidance_embeds"] else None,
    ).sample
    result: torch.Tensor = output.reshape(rows, down, across, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return result.reshape(rows, channels, height, width)
