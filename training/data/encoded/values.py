"""Numbers as they are stored: float32, or half as wide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.latents_config import StoredType

if TYPE_CHECKING:
    import torch

STORED: dict[StoredType, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""By safetensors' names."""


def as_bytes(values: torch.Tensor, stored: str) -> bytes:
    """Numbers in the stored type, row by row."""
    import torch

    kept = values.detach().to("cpu", _types()[stored]).contiguous()
    return kept.view(torch.uint8).numpy().tobytes() if kept.numel() else b""


def as_tensor(data: bytes, stored: str) -> torch.Tensor:
    """Stored numbers as float32, flat."""
    import torch

    if not data:
        return torch.empty(0)
    return torch.frombuffer(bytearray(data), dtype=_types()[stored]).float()


def _types() -> dict[str, torch.dtype]:
    import torch

    return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
