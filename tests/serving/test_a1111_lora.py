"""LoRAs inside the prompts of the A1111 dialect."""

from __future__ import annotations

import pytest

from serving.a1111_lora import without_lora
from serving.envelope import ApiError


@pytest.mark.parametrize(
    ("prompt", "left", "name"),
    [
        ("a cat", "a cat", None),
        ("a cat <lora:sepia:1>", "a cat", "sepia"),
        ("<lora:sepia>a cat", "a cat", "sepia"),
        ("a <lora:sepia:1.0> cat", "a  cat", "sepia"),
        ("a < b", "a < b", None),
    ],
)
def test_a_tag_names_an_adapter_and_leaves_the_prompt(prompt: str, left: str, name: str | None) -> None:
    assert without_lora(prompt) == (left, name)


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("<lora:a:1> <lora:b:1>", "one adapter at most"),
        ("<lora:a:0.5>", "a weight of 1"),
        ("<lora:a:x>", "a weight of 1"),
    ],
)
def test_what_would_be_disobeyed_is_refused(prompt: str, rule: str) -> None:
    with pytest.raises(ApiError, match=rule) as caught:
        without_lora(prompt)
    assert caught.value.body.param == "prompt"
