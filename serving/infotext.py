"""The text that the A1111 web UI writes into its pictures' ``parameters``, which its users' tools read back."""

from __future__ import annotations

import re
from collections.abc import Mapping

from training.sampling_config import SamplerName

KEY = "parameters"
"""The PNG text chunk that holds it."""
LABELS: dict[SamplerName, str] = {
    "euler": "Euler",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "ancestral": "Euler a",
    "lcm": "LCM",
}
"""What that UI calls our samplers."""
_SETTING = re.compile(r'(\w[\w ]{0,63}): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
"""Names are bounded, so that a stranger's text takes a time that only grows with its length."""


def to_infotext(parameters: Mapping[str, object]) -> str:
    """Prompt, negative prompt and one line of settings.

    Args:
        parameters: the fields of ``serving.parameters.Parameters``.
    """
    lines = [str(parameters["prompt"])]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}")
    settings = {
        "Steps": parameters["steps"],
        "Sampler": LABELS[str(parameters["sampler"])],  # type: ignore[index]  # the request was checked
        "CFG scale": parameters["guidance_scale"],
        "Seed": parameters["seed"],
        "Size": f"{parameters['width']}x{parameters['height']}",
        "Model hash": str(parameters["bundle_sha256"])[:10],
        "Model": parameters["model"],
    }
    if parameters.get("strength") is not None:
        settings["Denoising strength"] = parameters["strength"]
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def from_infotext(text: str) -> dict[str, str]:
    """The settings by name, with ``Prompt`` and ``Negative prompt``; nothing that is not text is made of them."""
    *body, last = text.strip().split("\n")
    found = {name.strip(): _unquoted(value) for name, value in _SETTING.findall(last)}
    if len(found) < 3:  # the UI's own rule: fewer are not a line of settings
        body, found = [*body, last], {}
    joined = "\n".join(body)
    prompt, _, negative = joined.partition("Negative prompt: ")
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **found}


def _quoted(value: object) -> str:
    text = str(value)
    if not set(text) & set(',:"\n'):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text.strip()
    return re.sub(r"\\(.)", lambda escaped: "\n" if escaped[1] == "n" else escaped[1], text[1:-1])
