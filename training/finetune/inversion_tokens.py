"""Captions become numbers of tokens, among them those of a word that is being learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.conditioning.shape import ConditioningShape
from training.conditioning.told import Conditioning
from training.errors import ConfigError, UsageError
from training.finetune.inversion_config import InvertedToken
from training.finetune.layout import CLIP_TOKENS, Pipeline
from training.finetune.tokens import encoders_hash

if TYPE_CHECKING:
    import torch


def ids_shape(pipeline: Pipeline) -> ConditioningShape:
    """Of the rows: a column for each encoder."""
    return ConditioningShape("text", CLIP_TOKENS, len(pipeline.encoders))


def ids_hash(pipeline: Pipeline, inverted: InvertedToken) -> str:
    """Of all that the rows depend on apart from the captions."""
    return hashlib.sha256(f"{encoders_hash(pipeline)} {inverted.model_dump_json()}".encode()).hexdigest()


def tokenizers_of(pipeline: Pipeline) -> list[Any]:
    """Of its encoders, in its order."""
    from transformers import AutoTokenizer

    folders = [pipeline.directory / name.replace("text_encoder", "tokenizer") for name in pipeline.encoders]
    return [AutoTokenizer.from_pretrained(each, local_files_only=True, trust_remote_code=False) for each in folders]


def word_ids(tokenizer: Any, inverted: InvertedToken) -> list[int]:
    """Teach a tokenizer the word; the numbers of its tokens.

    Raises:
        ConfigError: it knows the word.
    """
    vocabulary = tokenizer.get_vocab()
    for word in inverted.words:
        if word in vocabulary or f"{word}</w>" in vocabulary:  # as CLIP's marks the end of a word
            raise ConfigError(
                "The pipeline's tokenizer knows the word already.",
                value=word,
                rule="adapter.token is a new word, such as <my-word>",
            )
    tokenizer.add_tokens(list(inverted.words))
    numbers: list[int] = tokenizer.convert_tokens_to_ids(list(inverted.words))
    return numbers


class TokenEncoder:
    """Captions to numbers of tokens, which a ``TextualInversion`` encodes itself.

    Args:
        directory: of the pipeline.
        inverted: the new word.

    Attributes:
        shape: of its rows.

    Raises:
        ConfigError: the pipeline is not whole, or knows the word.
    """

    def __init__(self, directory: Path, inverted: InvertedToken) -> None:
        self.pipeline, self.inverted = Pipeline.read(directory), inverted
        self.shape = ids_shape(self.pipeline)
        self._tokenizers = tokenizers_of(self.pipeline)
        for tokenizer in self._tokenizers:
            word_ids(tokenizer, inverted)

    @cached_property
    def hash(self) -> str:
        """Equal hashes give equal rows."""
        return ids_hash(self.pipeline, self.inverted)

    def check(self, prompt: str) -> None:
        """Refuse a prompt that would be cut.

        Raises:
            UsageError: it has too many tokens.
        """
        count = len(self._tokenizers[-1](self.inverted.in_caption(prompt))["input_ids"])
        if count > CLIP_TOKENS:
            raise UsageError(
                f"The prompt has {count} tokens; this model reads at most {CLIP_TOKENS}.",
                value=prompt,
                rule=f"prompt <= {CLIP_TOKENS} tokens, start and end included",
                mend="shorten the prompt",
            )

    def encode(self, captions: Sequence[str], batch: int = 64) -> Conditioning:  # noqa: ARG002  as other encoders
        """A row per caption; ``""`` is the unconditional one."""
        import torch

        told = [self.inverted.in_caption(caption) for caption in captions]
        tokens = torch.stack([self._ids(tokenizer, told) for tokenizer in self._tokenizers], -1).float()
        if self.pipeline.kind == "sdxl" and self.pipeline.index.get("force_zeros_for_empty_prompt", True):
            empty = torch.tensor([not caption for caption in captions])
            tokens[empty] = -1.0  # as the pipeline guides away from nothing
        return Conditioning(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))

    @staticmethod
    def _ids(tokenizer: Any, captions: list[str]) -> torch.Tensor:
        options = {"padding": "max_length", "max_length": CLIP_TOKENS, "truncation": True, "return_tensors": "pt"}
        ids: torch.Tensor = tokenizer(captions, **options)["input_ids"]
        return ids
