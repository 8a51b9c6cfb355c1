"""The networks, one file per family; the union is the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from training.errors import ConfigError
from training.models.dit import DiTConfig, apply_dit
from training.models.flux import apply_flux
from training.models.pixart import PixArtConfig, apply_pixart
from training.models.pretrained import PretrainedConfig
from training.models.sana import apply_sana
from training.models.sd3 import SD3Config, apply_sd3
from training.models.unet import UNetConfig, apply_labelled_unet, apply_unet

if TYPE_CHECKING:
    import torch

    from training.conditioning import Conditioning


def _with_family(value: Any) -> Any:
    """A UNet where a recipe names no family."""
    return {"family": "unet", **value} if isinstance(value, Mapping) else value


ModelConfig = Annotated[
    UNetConfig | DiTConfig | SD3Config | PixArtConfig | PretrainedConfig,
    Field(discriminator="family"),
    BeforeValidator(_with_family),
]
"""Every model family."""

_APPLY: dict[str, Callable[..., Any]] = {
    "DiTTransformer2DModel": apply_dit,
    "FluxTransformer2DModel": apply_flux,
    "PixArtTransformer2DModel": apply_pixart,
    "SD3Transformer2DModel": apply_sd3,
    "SanaTransformer2DModel": apply_sana,
    "UNet2DConditionModel": apply_unet,
    "UNet2DModel": apply_labelled_unet,
}
"""How each of diffusers' classes is called; by its name, so that none is imported before it is used."""
_BEHIND_ENCODERS = "TextualInversion"
"""A network that is told numbers of tokens, and encodes them itself."""

__all__ = ["DiTConfig", "ModelConfig", "PixArtConfig", "SD3Config", "UNetConfig", "apply", "network_class"]


def network_class(name: str) -> Any:
    """The class of this name, of diffusers, imported now.

    Raises:
        ConfigError: no family of ours has it.
    """
    if name not in _APPLY:
        raise _unknown(name)
    import diffusers

    return getattr(diffusers, name)


def apply(network: Any, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """The network contract over whichever of diffusers' classes ``network`` is.

    Args:
        network: a diffusers model.
        x: ``[B,C,H,W]``.
        t: ``[B]`` in 0..1.
        conditioning: a row per row of ``x``.

    Returns:
        ``[B,C,H,W]`` the raw prediction.

    Raises:
        ConfigError: no family of ours has this class.
    """
    if type(network).__name__ == _BEHIND_ENCODERS:
        return apply(network.network, x, t, network.told(conditioning))
    called = _APPLY.get(type(network).__name__)
    if called is None:
        raise _unknown(type(network).__name__)
    result: torch.Tensor = called(network, x, t, conditioning)
    return result


def _unknown(name: str) -> ConfigError:
    return ConfigError("This network is of no known family.", value=name, rule="one of", options=sorted(_APPLY))
