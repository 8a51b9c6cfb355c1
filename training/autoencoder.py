"""A frozen autoencoder: pictures to the moments of their latents, and latents back to pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.errors import ConfigError
from training.finetune.files import load_part
from training.finetune.layout import factor_of

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

_CLASSES = ("AutoencoderKL", "AutoencoderDC")
_SCALES = {"AutoencoderKL": 0.18215, "AutoencoderDC": 1.0}
"""diffusers' ``scaling_factor`` where a config does not say it."""
_SURE = -30.0
"""The log-variance of latents that are not drawn: the lowest that ``LatentSpace.draw`` knows, a deviation of 3e-7."""


@dataclass(frozen=True)
class LatentSpace:
    """The space that an autoencoder's config describes; read without its weights.

    Attributes:
        channels: of a latent.
        factor: pixels of a picture's side for one of its latent's.
        scale: ``[channels,1,1]`` what latents are multiplied by once ``shift`` was subtracted, to have a standard
            deviation of about 1 (Rombach et al. 2022, section 4.3.2 and D.1; diffusers' ``scaling_factor``).
        shift: ``[channels,1,1]`` diffusers' ``shift_factor``, or the mean of each channel.
    """

    channels: int
    factor: int
    scale: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, directory: Path) -> LatentSpace:
        """The space of the autoencoder in a directory that ``autoencoder_directory`` checked."""
        told = json.loads((directory / "config.json").read_bytes())
        channels = int(told.get("latent_channels", 4))
        each = torch.ones(channels)
        scale = each * float(told.get("scaling_factor") or _SCALES[told["_class_name"]])
        shift = each * float(told.get("shift_factor") or 0.0)
        if told.get("latents_mean") and told.get("latents_std"):
            scale = scale / torch.tensor(told["latents_std"], dtype=torch.float32)
            shift = torch.tensor(told["latents_mean"], dtype=torch.float32)
        return cls(channels, factor_of(told), scale.reshape(-1, 1, 1), shift.reshape(-1, 1, 1))

    def draw(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents as the network sees them, drawn from their posterior (Kingma and Welling 2014, eq. 10).

        Args:
            moments: ``[..., 2 channels, h, w]`` mean and log-variance, the latter clipped as diffusers clips it.
            noise: ``[..., channels, h, w]`` standard normal.
        """
        mean, log_variance = moments.chunk(2, dim=-3)
        drawn = mean + torch.exp(0.5 * log_variance.clamp(_SURE, 20.0)) * noise
        return (drawn - self.shift.to(drawn.device)) * self.scale.to(drawn.device)

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        """What the decoder takes, of latents as the network sees them."""
        return latents / self.scale.to(latents.device) + self.shift.to(latents.device)


def autoencoder_directory(place: str | Path) -> Path:
    """The directory of an autoencoder, looked at and not loaded.

    Raises:
        ConfigError: it holds no ``AutoencoderKL`` or ``AutoencoderDC``, none for RGB pictures, or only pickled weights.
    """
    directory = Path(place)
    try:
        told = json.loads((directory / "config.json").read_bytes())
        found = told.get("_class_name") if isinstance(told, dict) else None
    except (OSError, ValueError):
        found = None
    if found not in _CLASSES:
        inner = directory / "vae"
        raise ConfigError(
            "The autoencoder cannot be found.",
            value=str(place),
            rule=f"a directory with a diffusers config.json of an {' or '.join(_CLASSES)}"
            + (f", not of a {found}" if found else ""),
            options=[str(inner)] if (inner / "config.json").is_file() else ["/path/to/pipeline/vae"],
        )
    if told.get("in_channels", 3) != 3 or told.get("out_channels", 3) != 3:
        raise ConfigError(
            "The autoencoder is not one of RGB pictures.", value=str(place), rule="in_channels and out_channels of 3"
        )
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            "The autoencoder's weights are not there.",
            value=str(place),
            rule="safetensors weights; pickled ones are not read",
            mend=f"{found}.from_pretrained(...).save_pretrained(DIR), where you trust them",
        )
    return directory


class Autoencoder:
    """A frozen ``AutoencoderKL``, or the ``AutoencoderDC`` of Sana (Chen et al. 2024), in float32.

    Args:
        directory: of a diffusers model; nothing is downloaded, nothing unpickled.
        device: where it runs.

    Raises:
        ConfigError: it cannot be loaded.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        import diffusers

        self.directory = autoencoder_directory(directory)
        self.space = LatentSpace.of(directory)
        kind = json.loads((directory / "config.json").read_bytes())["_class_name"]
        loaded = load_part(getattr(diffusers, kind), directory, "The autoencoder", torch_dtype=torch.float32)
        self.model: AutoencoderKL | AutoencoderDC = loaded.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    @torch.no_grad()
    def moments(self, pictures: torch.Tensor) -> torch.Tensor:
        """``[B, 2 channels, H/factor, W/factor]`` of ``[B,3,H,W]`` pictures in -1..1: mean and log-variance."""
        encoded: Any = self.model.encode(pictures.to(self.device))
        if not hasattr(encoded, "latent_dist"):  # AutoencoderDC draws nothing
            return torch.cat([encoded.latent, torch.full_like(encoded.latent, _SURE)], dim=1)
        posterior = encoded.latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """``[B,3,H,W]`` pictures of latents as the network sees them, around -1..1 and not clipped."""
        decoded: Any = self.model.decode(self.space.undo(latents.to(self.device, torch.float32)))
        pictures: torch.Tensor = decoded.sample
        return pictures
