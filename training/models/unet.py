"""The UNets: diffusers' ``UNet2DConditionModel`` for captions, ``UNet2DModel`` for classes or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from training.models.fresh import plain_attention_on_cpu
from training.models.mup import WidthTransfer
from training.models.sides import Size, require_multiples
from training.models.sizes_told import sdxl_added

if TYPE_CHECKING:
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from training.conditioning import Conditioning, ConditioningShape


class UNetConfig(WidthTransfer):
    """A UNet: with captions that of Rombach et al. 2022, without them that of Ho et al. 2020."""

    WIDTHS: ClassVar[tuple[str, ...]] = ("widths",)

    family: Literal["unet"] = "unet"
    """Chooses this family."""
    resolution: int = Field(default=32, ge=8, le=2048)
    """Side of the square images, in pixels."""
    widths: tuple[int, ...] = Field(default=(32, 64, 128), min_length=1)
    """Channels of each level, from fine to coarse; each level halves the side."""
    attention: tuple[bool, ...] = (False, False, True)
    """Which levels attend to themselves and to the caption."""
    layers_per_block: int = Field(default=1, ge=1, le=8)
    """Residual blocks per level."""
    head_width: int = Field(default=32, ge=4)
    """Channels of one attention head."""
    norm_groups: int = Field(default=8, ge=1)
    """Groups of the group normalisations."""

    @model_validator(mode="after")
    def _levels_agree(self) -> UNetConfig:
        if len(self.widths) != len(self.attention):
            raise ValueError(f"widths names {len(self.widths)} levels, attention {len(self.attention)}: one entry each")
        factor = 2 ** (len(self.widths) - 1)
        if self.resolution % factor:
            raise ValueError(
                f"resolution {self.resolution} must be a multiple of {factor} for {len(self.widths)} levels"
            )
        for width, attends in zip(self.widths, self.attention, strict=True):
            if width % self.norm_groups or (attends and width % self.head_width):
                raise ValueError(
                    f"width {width} must be a multiple of norm_groups {self.norm_groups}"
                    + (f" and of head_width {self.head_width}" if attends else "")
                )
        return self

    def check(self, kind: str, sizes: Sequence[Size]) -> None:  # noqa: ARG002 - it takes every kind
        """Refuse what the network cannot be told or shown.

        Args:
            kind: of the conditioning.
            sizes: of what the network sees, the square of its own resolution first.

        Raises:
            ValueError: with the rule.
        """
        levels = len(self.widths)
        require_multiples(sizes, 2 ** (levels - 1), f"for {levels} levels")

    def build(self, told: ConditioningShape, channels: int = 3, factor: int = 1) -> UNet2DConditionModel | UNet2DModel:
        """The network with fresh weights, drawn from torch's global generator.

        Args:
            told: what it is told about each picture.
            channels: of a picture, or of a latent.
            factor: pixels of a picture's side for one value of what the network sees.
        """
        arguments: dict[str, Any] = {
            "sample_size": self.resolution // factor,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_groups,
        }
        network = self._captioned(arguments, told) if told.kind == "text" else self._labelled(arguments, told)
        plain_attention_on_cpu(network)
        return network

    def _captioned(self, arguments: dict[str, Any], told: ConditioningShape) -> UNet2DConditionModel:
        from diffusers.models.unets.unet_2d_condition import (
            UNet2DConditionModel,
        )  # seconds to import, and a recipe is read without it

        kinds = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in self.attention]
        unet: UNet2DConditionModel = UNet2DConditionModel(
            **arguments,
            down_block_types=tuple(kinds),
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
            cross_attention_dim=told.width,
            # diffusers keeps the count of heads under this name (its issue 2011)
            attention_head_dim=tuple(max(1, width // self.head_width) for width in self.widths),
        )
        return unet

    def _labelled(self, arguments: dict[str, Any], told: ConditioningShape) -> UNet2DModel:
        from diffusers.models.unets.unet_2d import UNet2DModel

        kinds = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in self.attention]
        unet: UNet2DModel = UNet2DModel(
            **arguments,
            down_block_types=tuple(kinds),
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
            attention_head_dim=self.head_width,  # here it is what it says
            add_attention=self.attention[-1],
            num_class_embeds=told.classes + 1 if told.kind == "class" else None,
        )
        return unet


def apply_unet(
    unet: UNet2DConditionModel, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The network contract over diffusers' signature; its time embedding expects 0..1000.

    Channels-last activations make the convolutions 1.2 times as fast on a CPU; the weights stay as they are,
    because DeepSpeed flattens them.
    """
    import torch

    output = unet(
        x.contiguous(memory_format=torch.channels_last),
        t * 1000.0,
        encoder_hidden_states=conditioning.tokens,
        encoder_attention_mask=conditioning.mask,
        added_cond_kwargs=sdxl_added(unet, x, conditioning),
    )
    result: torch.Tensor = output.sample
    return result


def apply_labelled_unet(
    unet: UNet2DModel, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The network contract over the UNet that knows classes, or nothing."""
    import torch

    labels = None if unet.config["num_class_embeds"] is None else conditioning.labels()
    output = unet(x.contiguous(memory_format=torch.channels_last), t * 1000.0, class_labels=labels)
    result: torch.Tensor = output.sample
    return result
