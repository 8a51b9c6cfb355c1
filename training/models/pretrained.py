"""The network of a pipeline that a run starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from training.models.sides import Size, require_multiples

if TYPE_CHECKING:
    from training.conditioning import ConditioningShape


class PretrainedConfig(BaseModel):
    """The network of a pipeline; ``start.pipeline`` fills this in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["pretrained"] = "pretrained"
    """Chooses this family."""
    pipeline: str
    """The pipeline's directory."""
    resolution: int = Field(ge=8, le=4096)
    """Side of the square images, in pixels."""

    def check(self, kind: str, sizes: Sequence[Size]) -> None:
        """Refuse what the network cannot be told or shown.

        Args:
            kind: of the conditioning.
            sizes: of what the network sees, the square of its own resolution first.

        Raises:
            ValueError: with the rule.
            ConfigError: the pipeline is not there, or not whole.
        """
        if kind != "pipeline":
            raise ValueError(f"a pipeline's network is told captions by its own encoders, not by {kind}")
        if not sizes:
            return
        from training.finetune.layout import Pipeline

        pipeline = Pipeline.read(Path(self.pipeline))
        told = pipeline.network
        if pipeline.layout.network[0] == "unet":
            levels = len(told["block_out_channels"])
            require_multiples(sizes, 2 ** (levels - 1), f"for {levels} levels")
            return
        patch = 2 if pipeline.kind == "flux" else int(told.get("patch_size") or 1)
        require_multiples(sizes, patch, "the patch")
        longest = max(side for size in sizes for side in size)
        most = int(told.get("pos_embed_max_size") or longest // patch) * patch
        if longest > most:
            raise ValueError(f"a side of {longest} has more patches than the network has places for: at most {most}")

    def build(self, told: ConditioningShape, channels: int = 3, factor: int = 1) -> Any:  # noqa: ARG002
        """The network with the pipeline's weights, in float32.

        Args:
            told: what it is told about each picture.
            channels: of a latent.
            factor: pixels of a picture's side for one value of what the network sees.

        Raises:
            ConfigError: the weights do not load, or the network is of other latents or captions.
        """
        from training.finetune.network import load_network

        return load_network(Path(self.pipeline), told, channels)
