"""A tiny random model that serves in milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from training import noise
from training.conditioning import Conditioning, ConditioningShape
from training.errors import UsageError
from training.models import UNetConfig, apply
from training.objectives import Denoiser, RectifiedFlow

TINY = UNetConfig(resolution=8, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)
TEXT_WIDTH = 16
MAX_WORDS = 12


class HashEncoder:
    """Words to keyed noise: as an encoder should be, a function of the caption alone, without 84 MB of weights."""

    hash = "words"

    def check(self, prompt: str) -> None:
        count = len(prompt.split()) + 1
        if count > MAX_WORDS:
            raise UsageError(f"The prompt has {count} tokens.", value=prompt, rule=f"prompt <= {MAX_WORDS} tokens")

    def encode(self, captions: Sequence[str]) -> Conditioning:
        tokens = torch.zeros(len(captions), MAX_WORDS, TEXT_WIDTH)
        mask = torch.zeros(len(captions), MAX_WORDS, dtype=torch.bool)
        for row, caption in enumerate(captions):
            for place, word in enumerate(["<start>", *caption.split()]):
                key = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")
                tokens[row, place] = noise.normal(key, "word", shape=(TEXT_WIDTH,))
                mask[row, place] = True
        return Conditioning(tokens, mask)


@pytest.fixture(scope="session")
def denoiser() -> Denoiser:
    torch.set_num_threads(1)  # threads that wait for each other cost a tiny network more than they bring
    torch.manual_seed(0)
    unet = TINY.build(ConditioningShape("text", MAX_WORDS, TEXT_WIDTH)).eval().requires_grad_(False)
    return RectifiedFlow().denoiser(partial(apply, unet))


@pytest.fixture(scope="session")
def encoder() -> HashEncoder:
    return HashEncoder()
