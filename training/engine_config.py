"""What a recipe says of DeepSpeed's engine."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """DeepSpeed's engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the workers: 1 optimizer state, 2 and gradients, 3 and weights (Rajbhandari et al. 2020)."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = "auto"
    """Precision of the matrix products; auto is bf16 where every worker's hardware has it, fp32 elsewhere. fp16 comes
    with a loss scale that finds itself; fp8 is torchao's for linear layers, on Hopper GPUs and newer, bf16 for the
    rest. Master weights, their gradients and the optimizer stay fp32."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0 never clips."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows of one forward on one worker; the rest is accumulated. None takes a worker's whole share."""
    gradient_checkpointing: bool = False
    """Compute each block's activations again in the backward pass, which saves their memory for a third more time."""
    compile: Literal["none", "blocks", "whole"] = "none"
    """What torch.compile makes one kernel of as far as it can: every block of the network for itself, which compiles
    once for all alike, or the whole network."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's state and the fp32 weights lie: on the GPU, or from ZeRO 1 on in the node's memory (Ren et
    al. 2021, ZeRO-Offload) or on its disk (Rajbhandari et al. 2021, ZeRO-Infinity); the optimizer then steps on the
    CPU."""
    offload_path: str | None = Field(default=None, min_length=1)
    """A folder on a local disk of every node, for ``nvme``."""

    def stage_of(self, world: int) -> int:
        """The stage that so many workers run: one has nothing to share out, and need not pay for it."""
        return 0 if world == 1 and self.offload == "none" else self.zero_stage
