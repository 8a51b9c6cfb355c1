"""In which precision matrix products are computed, and what this machine can."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp16", "fp32", "fp8"]
"""What a recipe may ask for."""
Resolved = Literal["bf16", "fp16", "fp32", "fp8"]
"""What is computed in."""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""The type that autocast gives to matrix products; fp8's linear layers convert on their own."""


def has_bf16() -> bool:
    """Whether this machine multiplies in bf16 itself.

    A CPU without such instructions emulates them: a training step of the 32 px UNet took 18 times as long in bf16
    as in fp32 on an AVX2 machine.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # amx_bf16, avx512_bf16 and Arm's names all end so
    return any(there is True and name.endswith("bf16") for name, there in torch.cpu.get_capabilities().items())


def has_fp8() -> bool:
    """Whether this machine's GPU multiplies in fp8: Hopper and newer."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def resolve(wished: Precision) -> Resolved:
    """What this machine computes in: ``auto`` takes bf16 where the machine has it."""
    if wished == "auto":
        return "bf16" if has_bf16() else "fp32"
    return wished
