"""Captions that do not speak of their picture, by a CLIP directory that the user has; optional."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from training.data.clean.paths import Named
from training.data.findings import Finding, describe
from training.errors import ConfigError

Matcher = Callable[[Image.Image, str], float]


class MatchConfig(BaseModel):
    """Whether and where to cut by the similarity of caption and picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip: Named | None = None
    """A directory with a CLIP model in transformers' layout, weights as safetensors; none: the rule is off."""
    min_similarity: float = Field(default=0.2, ge=-1.0, le=1.0)
    """The least cosine of caption and picture. It depends on the model: LAION-400M took 0.3 for ViT-B/32."""


def open_matcher(directory: Path) -> Matcher:
    """The cosine (Radford et al. 2021) between a picture and as many tokens of its caption as the model reads.

    Raises:
        ConfigError: no CLIP model can be loaded from there; nothing is fetched or unpickled.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    if not (directory / "config.json").is_file():
        raise _no_clip(directory, "no config.json in it")
    try:
        model = CLIPModel.from_pretrained(directory, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        pictures = CLIPImageProcessorPil.from_pretrained(directory, local_files_only=True)
        words = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise _no_clip(directory, describe(error)) from error
    model.eval().requires_grad_(False)
    longest = model.text_model.embeddings.position_embedding.num_embeddings

    @torch.no_grad()
    def match(picture: Image.Image, caption: str) -> float:
        tokens = words([caption], truncation=True, max_length=longest, return_tensors="pt")
        pixels = pictures(images=[picture], return_tensors="pt")["pixel_values"]
        seen = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        return float(torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)[0])

    return match


def _no_clip(directory: Path, reason: str) -> ConfigError:
    return ConfigError(
        "The CLIP model cannot be loaded.",
        value=str(directory),
        rule=reason,
        options=("config.json", "model.safetensors", "preprocessor_config.json", "the tokenizer's files"),
        mend="name a directory that transformers' CLIPModel.save_pretrained wrote, with its processor",
    )


def caption_mismatch(similarity: float | None, config: MatchConfig) -> Finding | None:
    """A similarity under ``min_similarity``; a picture without a caption has none, and passes."""
    if similarity is None or similarity >= config.min_similarity:
        return None
    detail = f"caption and picture match {similarity:.3f} < {config.min_similarity:g}"
    return Finding("caption_mismatch", similarity, config.min_similarity, detail)
