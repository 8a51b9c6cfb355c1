"""Which stages, optimizers and options work together; looked at before any worker starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.ema import EmaConfig
    from training.engine_config import EngineConfig
    from training.optim import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class Choice:
    """What a recipe asks for.

    Attributes:
        engine: the engine section.
        optimizer: the optimizer section.
        schedule: the schedule section.
        ema: the ema section.
    """

    engine: EngineConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    ema: EmaConfig


@dataclass(frozen=True)
class Rule:
    """One that a choice can break.

    Attributes:
        broken: whether it does.
        why: what does not work, and for what reason.
        instead: what would work.
    """

    broken: Callable[[Choice], bool]
    why: str
    instead: str


RULES = (
    Rule(
        lambda c: c.engine.offload != "none" and c.engine.zero_stage == 0,
        "engine.offload does not work at engine.zero_stage 0: there is no optimizer state of a rank's own",
        "engine.zero_stage 1, 2 or 3",
    ),
    Rule(
        lambda c: c.engine.offload == "nvme" and c.engine.offload_path is None,
        "engine.offload nvme needs a folder on a local disk of every node",
        "engine.offload_path, or engine.offload cpu",
    ),
    Rule(
        lambda c: c.engine.offload != "nvme" and c.engine.offload_path is not None,
        "engine.offload_path is where nothing would be put",
        "engine.offload nvme beside it, or no engine.offload_path",
    ),
    Rule(
        lambda c: c.optimizer.kind == "adafactor" and c.engine.zero_stage != 0,
        "adafactor needs whole matrices, and ZeRO cuts them",
        "engine.zero_stage 0, or optimizer.kind adamw, schedule_free or muon",
    ),
    Rule(
        lambda c: c.optimizer.kind == "muon" and c.engine.offload != "none",
        "muon makes matrices orthogonal on the GPU, and engine.offload keeps them off it",
        "no engine.offload, or optimizer.kind adamw or schedule_free",
    ),
    Rule(
        lambda c: c.optimizer.kind == "schedule_free" and c.schedule.kind != "constant",
        "a schedule-free optimizer has no use for a rate that falls",
        "schedule.kind constant, whose warm-up it keeps",
    ),
    Rule(
        lambda c: c.optimizer.kind == "schedule_free" and c.ema.post_hoc is not None,
        "a schedule-free optimizer averages the weights itself, so there is no length to choose afterwards",
        "no ema.post_hoc, or optimizer.kind adamw or muon",
    ),
    Rule(
        lambda c: c.ema.publish_length is not None and c.ema.post_hoc is None,
        "ema.publish_length needs the snapshots of ema.post_hoc",
        "ema.post_hoc: {}, or no ema.publish_length",
    ),
    Rule(
        lambda c: c.engine.precision == "fp8" and c.engine.zero_stage == 3,
        "fp8's linear layers need their weights where they are, and engine.zero_stage 3 takes them apart",
        "engine.zero_stage 0, 1 or 2, or engine.precision bf16",
    ),
    Rule(
        lambda c: c.engine.compile == "whole" and c.engine.zero_stage == 3,
        "engine.compile whole cannot see through the gathering of weights at engine.zero_stage 3",
        "engine.compile blocks or none, or engine.zero_stage 0, 1 or 2",
    ),
)
"""Every rule, in the order in which they are told."""


def require_workable(
    engine: EngineConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig, ema: EmaConfig
) -> None:
    """Whether these sections work together.

    Raises:
        ValueError: they do not; says why, and what would.
    """
    choice = Choice(engine, optimizer, schedule, ema)
    for rule in RULES:
        if rule.broken(choice):
            raise ValueError(f"{rule.why}; what works: {rule.instead}")
