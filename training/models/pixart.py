"""PixArt-alpha (Chen et al. 2023): diffusers' ``PixArtTransformer2DModel``, for captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from training.models.fresh import initialise, plain_attention_on_cpu
from training.models.sides import Size, require_multiples
from training.models.sizes_told import pixart_added
from training.models.transformer import TransformerConfig

if TYPE_CHECKING:
    import torch
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    from training.conditioning import Conditioning, ConditioningShape


class PixArtConfig(TransformerConfig):
    """A DiT that attends to captions. PixArt-alpha has 28 layers of 16 heads of 72."""

    family: Literal["pixart"] = "pixart"
    """Chooses this family."""

    def check(self, kind: str, sizes: Sequence[Size]) -> None:
        """Refuse what the network cannot be told or shown.

        Args:
            kind: of the conditioning.
            sizes: of what the network sees, the square of its own resolution first.

        Raises:
            ValueError: with the rule.
        """
        if kind in ("class", "none"):
            raise ValueError(f"family pixart is told captions, not {kind}: conditioning.kind=text, or family dit, unet")
        require_multiples(sizes, self.patch, "the patch")

    def build(self, told: ConditioningShape, channels: int = 3, factor: int = 1) -> PixArtTransformer2DModel:
        """The network with fresh weights, drawn from torch's global generator.

        Args:
            told: what it is told about each picture.
            channels: of a picture, or of a latent.
            factor: pixels of a picture's side for one value of what the network sees.
        """
        from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

        network: PixArtTransformer2DModel = PixArtTransformer2DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.head_width,
            in_channels=channels,
            out_channels=channels,
            num_layers=self.layers,
            cross_attention_dim=self.width,
            sample_size=self.resolution // factor,
            patch_size=self.patch,
            use_additional_conditions=False,  # diffusers would want sizes of each picture at a side of 128
            caption_channels=told.width,
        )
        blocks: Any = network.transformer_blocks
        attentions = [block.attn2.to_out[0] for block in blocks]
        initialise(network, *attentions, network.proj_out)
        plain_attention_on_cpu(network)
        return network


def apply_pixart(
    pixart: PixArtTransformer2DModel, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The network contract over diffusers' signature. A variance that a network learned elsewhere is left out."""
    output: torch.Tensor = pixart(
        x,
        encoder_hidden_states=conditioning.tokens,
        encoder_attention_mask=conditioning.mask,
        timestep=t * 1000.0,
        added_cond_kwargs=pixart_added(pixart, x),
    ).sample
    return output[:, : x.shape[1]]
