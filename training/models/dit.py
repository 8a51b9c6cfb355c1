"""DiT (Peebles and Xie 2023): diffusers' ``DiTTransformer2DModel``, for classes or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from training.models.fresh import initialise, plain_attention_on_cpu
from training.models.sides import Size, require_multiples, require_one_size, require_square
from training.models.transformer import TransformerConfig

if TYPE_CHECKING:
    import torch
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    from training.conditioning import Conditioning, ConditioningShape


class DiTConfig(TransformerConfig):
    """A diffusion transformer with adaLN-Zero blocks. XL/2 has 28 layers of 16 heads of 72 and patches of 2."""

    family: Literal["dit"] = "dit"
    """Chooses this family."""

    def check(self, kind: str, sizes: Sequence[Size]) -> None:
        """Refuse what the network cannot be told or shown.

        Args:
            kind: of the conditioning.
            sizes: of what the network sees, the square of its own resolution first.

        Raises:
            ValueError: with the rule.
        """
        if kind not in ("class", "none"):
            raise ValueError(
                f"family dit is told a class or nothing, not {kind}: conditioning.kind=class, or family sd3, pixart"
            )
        require_square(sizes, "dit")
        require_one_size(sizes, "dit")
        require_multiples(sizes, self.patch, "the patch")

    def build(self, told: ConditioningShape, channels: int = 3, factor: int = 1) -> DiTTransformer2DModel:
        """The network with fresh weights, drawn from torch's global generator.

        Its output has no channels for a variance: no objective of ours learns one.

        Args:
            told: what it is told about each picture.
            channels: of a picture, or of a latent.
            factor: pixels of a picture's side for one value of what the network sees.
        """
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        network: DiTTransformer2DModel = DiTTransformer2DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.head_width,
            in_channels=channels,
            out_channels=channels,
            num_layers=self.layers,
            sample_size=self.resolution // factor,
            patch_size=self.patch,
            num_embeds_ada_norm=told.classes,  # diffusers adds the unconditional one
        )
        blocks: Any = network.transformer_blocks
        initialise(network, *(block.norm1.linear for block in blocks), network.proj_out_1, network.proj_out_2)
        plain_attention_on_cpu(network)
        return network


def apply_dit(dit: DiTTransformer2DModel, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """The network contract over diffusers' signature. A variance that a network learned elsewhere is left out."""
    _without_dropout(dit)
    output: torch.Tensor = dit(x, timestep=t * 1000.0, class_labels=conditioning.labels()).sample
    return output[:, : x.shape[1]]


def _without_dropout(dit: DiTTransformer2DModel) -> None:
    """Labels are dropped by the objective, once for the whole network and by keyed numbers.

    diffusers' embeddings drop a tenth of them while training, in each block on its own, by torch's global generator.
    """
    blocks: Any = dit.transformer_blocks
    for block in blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
