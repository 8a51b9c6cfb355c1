"""What makes pictures faster, each behind a switch of its own, and what it does to them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SpeedConfig(BaseModel):
    """What makes pictures faster; all of it is off by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_cache_bytes: int = Field(default=0, ge=0)
    """Memory for the rows of prompts that were encoded before, the empty prompt's above all. Changes no bit."""
    step_cache: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """Evaluations whose foretold change is below this share of the picture are left out; 0 leaves none out. Only the
    samplers ``euler`` and ``dpmpp_2m`` use it: the others draw noise or correct themselves. Pictures differ from those
    without it: the higher, the more; 0.05 leaves out about half of 50 steps."""
    compiled: bool = False
    """Compile the network for each size (``torch.compile``): kernels are fused, and a picture's last bits change, in
    float32 by one of 255 levels at most. The first call of each size takes a minute or more."""
    cuda_graphs: bool = False
    """On a GPU, record the network's kernels once for each size and adapter, and replay them: changes no bit."""
    bf16: bool = False
    """Matrix products in bfloat16 where the device has them; weights stay float32. Pictures differ by a few of 255
    levels."""
