"""How many tokens a pipeline's encoders read, and of what shape their states are; read without torch."""

from __future__ import annotations

import hashlib

from training.conditioning.shape import ConditioningShape
from training.directory_hash import directory_hash
from training.finetune.layout import CLIP_TOKENS, Pipeline


def shape_of(pipeline: Pipeline, max_tokens: int) -> ConditioningShape:
    """Of the rows, from the config of the network that is told them.

    Args:
        pipeline: of the encoders.
        max_tokens: of the longest caption, where T5 or Gemma reads it; CLIP's length is its own.
    """
    told, pooled = pipeline.network, 0
    if pipeline.kind in ("sd", "sdxl"):
        width = told["cross_attention_dim"]
        if pipeline.kind == "sdxl":
            pooled = told["projection_class_embeddings_input_dim"] - 6 * told["addition_time_embed_dim"]
    elif pipeline.kind in ("sd3", "flux"):
        width, pooled = told["joint_attention_dim"], told["pooled_projection_dim"]
    else:
        width = told["caption_channels"]
    tokens = {"sd": CLIP_TOKENS, "sdxl": CLIP_TOKENS, "sd3": CLIP_TOKENS + max_tokens}.get(pipeline.kind, max_tokens)
    return ConditioningShape("text", tokens, int(width), int(pooled))


def encoders_hash(pipeline: Pipeline) -> str:
    """Of the files of all encoders and tokenizers, and of what else the rows depend on."""
    digest = hashlib.sha256(pipeline.name.encode())
    for name in pipeline.encoders:
        for part in (name, name.replace("text_encoder", "tokenizer")):
            digest.update(f"{part} {directory_hash(pipeline.directory / part)}".encode())
    digest.update(str(pipeline.index.get("force_zeros_for_empty_prompt")).encode())
    return digest.hexdigest()
