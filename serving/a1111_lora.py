"""LoRAs as the A1111 web UI asks for them: ``<lora:name:weight>`` inside the prompt."""

from __future__ import annotations

import re

from serving.openai_request import out_of_range

_TAG = re.compile(r"<lora:([^:<>]{1,64})(?::([^<>]{1,16}))?>")


def without_lora(prompt: str) -> tuple[str, str | None]:
    """The prompt without its tag, and the adapter that the tag names; None where there is none.

    Raises:
        ApiError: several adapters, or one at another weight than 1.
    """
    tags = list(_TAG.finditer(prompt))
    if not tags:
        return prompt, None
    if len(tags) > 1:
        raise out_of_range("prompt", f"{len(tags)} LoRAs", "one: this server runs a picture with one adapter at most")
    name, weight = tags[0].group(1), tags[0].group(2)
    if weight is not None and weight.strip() not in {"1", "1.0"}:
        raise out_of_range("prompt", tags[0].group(0), "a weight of 1, at which the adapter was trained")
    return _TAG.sub("", prompt).strip(), name
