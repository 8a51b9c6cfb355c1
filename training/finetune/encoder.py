"""Captions become what a pipeline's own encoders make of them, as diffusers' pipeline hands it to the network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.conditioning.told import Conditioning
from training.errors import ConfigError, UsageError
from training.finetune.files import weights_variant
from training.finetune.layout import CLIP_TOKENS, Pipeline
from training.finetune.tokens import encoders_hash, shape_of

if TYPE_CHECKING:
    import torch


class PipelineEncoder:
    """The frozen text encoders of a pipeline, in float32; nothing is downloaded, nothing unpickled, no code is run.

    Args:
        directory: of the pipeline.
        max_tokens: of the longest caption.

    Attributes:
        shape: of its rows.

    Raises:
        ConfigError: the pipeline is not whole, or its encoders do not load.
    """

    def __init__(self, directory: Path, max_tokens: int) -> None:
        import torch

        self.pipeline = Pipeline.read(directory)
        self.directory, self.max_tokens = directory, max_tokens
        self.shape = shape_of(self.pipeline, max_tokens)
        try:
            self.pipe = _load(self.pipeline)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError("The pipeline's encoders do not load.", value=str(directory), rule=str(error)) from error
        for name in self.pipeline.encoders:
            getattr(self.pipe, name).to(torch.float32).eval().requires_grad_(False)

    @cached_property
    def hash(self) -> str:
        """Equal hashes give equal rows."""
        return hashlib.sha256(f"{encoders_hash(self.pipeline)} {self.max_tokens}".encode()).hexdigest()

    def check(self, prompt: str) -> None:
        """Refuse a prompt that no encoder would read to its end.

        Raises:
            UsageError: the prompt has more tokens than the pipeline reads.
        """
        last = self.pipeline.encoders[-1].replace("text_encoder", "tokenizer")
        count = len(getattr(self.pipe, last)(prompt)["input_ids"])
        # SD3 may be without its T5: CLIP then reads alone
        by_clip = self.pipeline.index[self.pipeline.encoders[-1]][1].startswith("CLIP")
        most = CLIP_TOKENS if by_clip else self.max_tokens
        if count > most:
            raise UsageError(
                f"The prompt has {count} tokens; this model reads at most {most}.",
                value=prompt if len(prompt) <= 80 else prompt[:77] + "...",
                rule=f"prompt <= {most} tokens, start and end included",
                mend="shorten the prompt",
            )

    def encode(self, captions: Sequence[str], batch: int = 64) -> Conditioning:
        """A row per caption, in passes of ``batch``; ``""`` is the unconditional one."""
        import torch

        passes = [list(captions[start : start + batch]) for start in range(0, len(captions), batch)]
        with torch.no_grad():
            return Conditioning.cat([self._encode(each) for each in passes])

    def _encode(self, captions: list[str]) -> Conditioning:
        import torch

        tokens, mask, pooled = _ENCODE[self.pipeline.kind](self.pipe, captions, self.max_tokens)
        if mask is None:  # its network attends to the padding, whose states are the encoder's
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        mask = mask.bool()
        tokens = (tokens * mask[..., None]).float()
        return Conditioning(tokens, mask, None if pooled is None else pooled.float())


def _load(pipeline: Pipeline) -> Any:
    """Diffusers' pipeline with its encoders and tokenizers only."""
    import diffusers
    import torch
    import transformers
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    logging.disable_progress_bar()  # whoever waits has a bar of ours
    diffusers_logging.disable_progress_bar()
    network, kind = pipeline.layout.network
    parts: dict[str, Any] = dict.fromkeys(("unet", "transformer", "vae", "scheduler", "image_encoder"))
    parts |= {"safety_checker": None, "feature_extractor": None}
    taken = {name for name, part in pipeline.index.items() if isinstance(part, list)}
    parts = {name: part for name, part in parts.items() if name in taken | {network}}
    for name in set(pipeline.layout.encoders) - set(pipeline.encoders):
        parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
    if pipeline.kind == "sd3" and len(pipeline.encoders) < len(pipeline.layout.encoders):
        with torch.device("meta"):  # the pipeline asks the network how wide the missing encoder's states would be
            parts[network] = getattr(diffusers, kind).from_config(pipeline.network)
    strict: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    for name in pipeline.encoders:  # each by itself: one may be there in one precision only, and another in another
        folder, kind = pipeline.directory / name, pipeline.index[name][1]
        parts[name] = getattr(transformers, kind).from_pretrained(folder, variant=weights_variant(folder), **strict)
    return getattr(diffusers, pipeline.name).from_pretrained(pipeline.directory, **parts, **strict)


Told = tuple["torch.Tensor", "torch.Tensor | None", "torch.Tensor | None"]


def _sd(pipe: Any, captions: list[str], max_tokens: int) -> Told:  # noqa: ARG001 - CLIP's own
    tokens, _ = pipe.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    return tokens, None, None


def _sdxl(pipe: Any, captions: list[str], max_tokens: int) -> Told:  # noqa: ARG001 - CLIP's own
    tokens, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:
        for row, caption in enumerate(captions):
            if not caption:  # as the pipeline guides away from nothing
                tokens[row], pooled[row] = 0.0, 0.0
    return tokens, None, pooled


def _sd3(pipe: Any, captions: list[str], max_tokens: int) -> Told:
    tokens, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=max_tokens
    )
    return tokens, None, pooled


def _flux(pipe: Any, captions: list[str], max_tokens: int) -> Told:
    tokens, pooled, _ = pipe.encode_prompt(captions, None, device="cpu", max_sequence_length=max_tokens)
    return tokens, None, pooled


def _pixart(pipe: Any, captions: list[str], max_tokens: int) -> Told:
    tokens, mask, _, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, device="cpu", max_sequence_length=max_tokens
    )
    return tokens, mask, None


def _sana(pipe: Any, captions: list[str], max_tokens: int) -> Told:
    """Its instruction stands before each caption, and not before the empty one, as in the pipeline's call."""
    import inspect

    import torch

    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    options = {"device": "cpu", "max_sequence_length": max_tokens}
    tokens, mask, _, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, complex_human_instruction=instruction, **options
    )
    empty = torch.tensor([not caption for caption in captions])
    if empty.any():
        without, without_mask, _, _ = pipe.encode_prompt([""], do_classifier_free_guidance=False, **options)
        tokens, mask = (
            torch.where(empty[:, None, None], without, tokens),
            torch.where(empty[:, None], without_mask, mask),
        )
    return tokens, mask, None


_ENCODE = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "pixart": _pixart, "sana": _sana}
