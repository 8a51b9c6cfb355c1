"""What networks of some pipelines are told of a picture's size; ours are seen whole, at the size that they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from training.conditioning import Conditioning

_PIXELS = 8
"""Of a side for one value of a latent, in the autoencoders of Stable Diffusion, SDXL and PixArt."""


def sdxl_added(unet: Any, x: torch.Tensor, conditioning: Conditioning) -> dict[str, Any] | None:
    """SDXL's micro-conditioning (Podell et al. 2023, section 2.2) and the pooled state; None for other UNets."""
    if unet.config["addition_embed_type"] != "text_time":
        return None
    height, width = (side * _PIXELS for side in x.shape[2:])
    ids = x.new_tensor([height, width, 0, 0, height, width])  # original size, crop, size
    return {"text_embeds": conditioning.summary(), "time_ids": ids.expand(len(x), -1)}


def pixart_added(pixart: Any, x: torch.Tensor) -> dict[str, Any]:
    """PixArt-alpha's sizes at 1024 px (Chen et al. 2023, section 2.5); None for each where it takes none."""
    if not pixart.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    height, width = (side * _PIXELS for side in x.shape[2:])
    return {
        "resolution": x.new_tensor([height, width]).expand(len(x), -1),
        "aspect_ratio": x.new_tensor([height / width]).expand(len(x), -1),
    }
