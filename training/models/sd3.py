"""MM-DiT (Esser et al. 2024): diffusers' ``SD3Transformer2DModel``, for captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from training.models.fresh import initialise
from training.models.sides import Size, require_multiples
from training.models.transformer import TransformerConfig

if TYPE_CHECKING:
    import torch
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from training.conditioning import Conditioning, ConditioningShape


class SD3Config(TransformerConfig):
    """A transformer of pictures and captions that attend to one another. SD3 medium has 24 layers of 24 heads of 64."""

    family: Literal["sd3"] = "sd3"
    """Chooses this family."""
    qk_norm: bool = True
    """Normalise queries and keys (root mean square), which keeps bf16 training stable."""
    max_patches: int = Field(default=96, ge=4, le=512)
    """Patches along the longest side of any shape: positions are cut from a square of so many."""

    def check(self, kind: str, sizes: Sequence[Size]) -> None:
        """Refuse what the network cannot be told or shown.

        Args:
            kind: of the conditioning.
            sizes: of what the network sees, the square of its own resolution first.

        Raises:
            ValueError: with the rule.
        """
        if kind in ("class", "none"):
            raise ValueError(f"family sd3 is told captions, not {kind}: conditioning.kind=text, or family dit, unet")
        require_multiples(sizes, self.patch, "the patch")
        longest = max((side for size in sizes for side in size), default=0)
        if longest > self.max_patches * self.patch:
            raise ValueError(
                f"a side of {longest} has {longest // self.patch} patches of {self.patch}; max_patches is"
                f" {self.max_patches}: model.max_patches={longest // self.patch}, a larger patch or narrower buckets"
            )

    def build(self, told: ConditioningShape, channels: int = 3, factor: int = 1) -> SD3Transformer2DModel:
        """The network with fresh weights, drawn from torch's global generator.

        Args:
            told: what it is told about each picture.
            channels: of a picture, or of a latent.
            factor: pixels of a picture's side for one value of what the network sees.
        """
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        network: SD3Transformer2DModel = SD3Transformer2DModel(
            sample_size=self.resolution // factor,
            patch_size=self.patch,
            in_channels=channels,
            out_channels=channels,
            num_layers=self.layers,
            attention_head_dim=self.head_width,
            num_attention_heads=self.heads,
            joint_attention_dim=told.width,
            caption_projection_dim=self.width,
            pooled_projection_dim=told.pooled or told.width,
            pos_embed_max_size=self.max_patches,
            qk_norm="rms_norm" if self.qk_norm else None,
        )
        blocks: Any = network.transformer_blocks
        modulations = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
        initialise(network, *modulations, network.norm_out.linear, network.proj_out)
        return network


def apply_sd3(sd3: SD3Transformer2DModel, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """The network contract over diffusers' signature.

    The network takes no mask: padding has states of zero and is attended to, as in SD3. Where the encoder has no
    pooled state, the mean of the caption's tokens stands for it.
    """
    output: torch.Tensor = sd3(
        x,
        encoder_hidden_states=conditioning.tokens,
        pooled_projections=conditioning.summary(),
        timestep=t * 1000.0,
    ).sample
    return output
