"""The networks, one file per family; the union is the registry."""

from training.models.unet import UNetConfig, apply_unet

ModelConfig = UNetConfig
"""Every model family."""

__all__ = ["ModelConfig", "UNetConfig", "apply_unet"]
