"""What a pipeline's encoders read, and their folders as a recipe's own text encoder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.conditioning import TextConfig, TextEncoder
from training.errors import UsageError
from training.finetune.encoder import PipelineEncoder


def test_a_prompt_that_clip_would_cut_is_refused_where_it_reads_alone(tiny: Callable[[str], Path]) -> None:
    encoder = PipelineEncoder(tiny("sd3-two-encoders"), 256)
    encoder.check("a" * 10)
    with pytest.raises(UsageError, match="this model reads at most 77"):
        encoder.check(" ".join("a" * 80))


def test_t5_reads_captions_from_a_directory_of_its_own(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    tiny("sd")  # loads the module
    model, tokenizer = sys.modules["tiny_pipelines"].t5()
    model.eval().save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    encoder = TextEncoder.from_config(TextConfig(encoder=str(tmp_path / "t5"), max_tokens=8))
    told = encoder.encode(["abc"])
    inputs = tokenizer(["abc"], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        states = model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert told.pooled is None
    assert torch.equal(told.mask, inputs["attention_mask"].bool())
    torch.testing.assert_close(told.tokens, states * told.mask[..., None])


def test_clip_of_pictures_and_words_reads_captions_with_its_words_alone(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import CLIPConfig, CLIPModel

    tiny("sd")
    text, tokenizer = sys.modules["tiny_pipelines"].clip(tmp_path / "words", projected=False)
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = CLIPModel(
        CLIPConfig(text_config=text.config.to_dict(), vision_config={**seen, "image_size": 32, "patch_size": 16})
    ).eval()
    both.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    encoder = TextEncoder.from_config(TextConfig(encoder=str(tmp_path / "clip"), max_tokens=8))
    told = encoder.encode(["abc"])
    inputs = tokenizer(["abc"], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        found = both.text_model(**inputs)
    assert told.pooled is not None
    torch.testing.assert_close(told.pooled, found.pooler_output)
    torch.testing.assert_close(told.tokens, found.last_hidden_state * told.mask[..., None])
