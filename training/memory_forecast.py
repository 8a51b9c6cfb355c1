"""What a worker's device must hold while it trains, by formula; and what would fit where that is too much.

The parts follow Rajbhandari et al. 2020 (ZeRO, section 3) with fp32 weights, as the engine keeps them; activations
come from the network itself (``training.footprint``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.checkpoint.memory import SLOTS
from training.errors import ConfigError
from training.flops import GIB

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.footprint import Footprint

FLOAT = 4
"""Bytes of an fp32 number."""
MOST_OPTIONS = 4


@dataclass(frozen=True)
class Device:
    """What a worker computes on.

    Attributes:
        name: of the card, or ``CPU``.
        memory_bytes: that one worker may take; None where it is not known.
        peak_flops: FLOP/s at most; None where it is not known.
        base_bytes: that the process takes before there is a network.
    """

    name: str
    memory_bytes: int | None
    peak_flops: float | None
    base_bytes: int

    @property
    def is_gpu(self) -> bool:
        """Whether host memory is another one."""
        return self.name != "CPU"


@dataclass(frozen=True)
class MemoryForecast:
    """What one worker's device holds at the most.

    Attributes:
        parts: bytes by what they are for.
    """

    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def rows_of(config: TrainConfig, world: int) -> int:
    """Rows of one forward on one worker."""
    share = math.ceil(config.global_batch / world)
    return min(config.engine.micro_batch or share, share)


def forecast(config: TrainConfig, footprint: Footprint, world: int, device: Device) -> MemoryForecast:
    """The parts of a recipe on ``world`` workers."""
    stage = config.engine.stage_of(world)
    trained, every, slots = (FLOAT * each for each in (footprint.trained, footprint.parameters, footprint.optimizer))
    off_gpu = device.is_gpu and config.engine.offload != "none"  # the host's memory holds it then
    on_disk = config.engine.offload == "nvme"
    away = off_gpu or on_disk
    averages = (1 + (len(config.ema.post_hoc.lengths) if config.ema.post_hoc else 0)) * trained
    kept = trained + slots + averages
    beside = device.is_gpu or on_disk or not config.checkpoint.memory_every_steps
    parts = {
        "process": device.base_bytes,
        "weights": every // (world if stage == 3 else 1),
        "gradients": trained // (world if stage >= 2 else 1),
        "master weights": 0 if stage == 0 or away else trained // world,
        "optimizer": 0 if away else slots // (world if stage else 1),
        "averages": 0 if off_gpu else averages // world,
        "evaluation's copy": every,
        "node memory": 0 if beside else SLOTS * kept // world,
        "activations": footprint.activation_bytes(rows_of(config, world)),
    }
    return MemoryForecast({name: size for name, size in parts.items() if size})


def require_room(
    config: TrainConfig, footprint: Footprint, world: int, device: Device, again: Callable[[TrainConfig], Footprint]
) -> None:
    """Refuse a recipe that the devices cannot hold.

    Args:
        config: the recipe.
        footprint: of its network.
        world: workers.
        device: of one worker.
        again: measures the network of a recipe.

    Raises:
        ConfigError: it cannot fit; the message says what takes how much, and what would.
    """
    found = forecast(config, footprint, world, device)
    if device.memory_bytes is None or found.total_bytes <= device.memory_bytes:
        return
    rows = rows_of(config, world)
    checkpointed = None if config.engine.gradient_checkpointing else again(_with(config, gradient_checkpointing=True))
    largest = sorted(found.parts.items(), key=lambda part: -part[1])[:3]
    raise ConfigError(
        f"The recipe does not fit: a worker would need {gib(found.total_bytes)} of memory.",
        value=f"{rows} rows of a micro-batch, {footprint.parameters:,} parameters: "
        + ", ".join(f"{name} {gib(size)}" for name, size in largest),
        rule=f"at most {gib(device.memory_bytes)}, which a worker has on {device.name}",
        options=what_fits(config, footprint, world, device, checkpointed),
        mend="--dry-run shows every part",
    )


def what_fits(
    config: TrainConfig, footprint: Footprint, world: int, device: Device, checkpointed: Footprint | None
) -> list[str]:
    """Changes to a recipe that make it fit, the smallest first, as ``--set`` takes them.

    Args:
        config: the recipe.
        footprint: of its network.
        world: workers.
        device: of one worker.
        checkpointed: of its network under gradient checkpointing; None where that is no choice.
    """
    room = device.memory_bytes
    if room is None:
        return []
    changes = [(words, changed, footprint) for words, changed in _changes(config, world)]
    if checkpointed is not None:
        lean = _with(config, gradient_checkpointing=True)
        word = "engine.gradient_checkpointing=true"
        also = [([word, *words], changed, checkpointed) for words, changed in _changes(lean, world)]
        changes = [*changes, ([word], lean, checkpointed), *also]
    sizes = [(" ".join(words), forecast(changed, its, world, device).total_bytes) for words, changed, its in changes]
    fitting: dict[str, str] = {}  # the largest micro-batch of each way
    for words, size in sizes:
        if size <= room:
            fitting.setdefault(re.sub(r"engine\.micro_batch=\d+", "", words).strip(), words)
    if fitting:
        return sorted(fitting.values(), key=lambda words: words.count(" "))[:MOST_OPTIONS]
    least = min(size for _, size in [*sizes, ("", forecast(config, footprint, world, device).total_bytes)])
    return [f"a smaller model: this one takes {gib(least)} at the least"]


def _changes(config: TrainConfig, world: int) -> Iterator[tuple[list[str], TrainConfig]]:
    """What may be changed without training another model: smaller micro-batches, then more that is sharded."""
    rows = rows_of(config, world)
    smaller = list(_halves(rows))
    stages = [stage for stage in (1, 2, 3) if stage > config.engine.zero_stage] if world > 1 else []
    for size in smaller:
        yield [f"engine.micro_batch={size}"], _with(config, micro_batch=size)
    for stage in stages:
        yield [f"engine.zero_stage={stage}"], _with(config, zero_stage=stage)
    for stage in stages:
        for size in smaller:
            words = [f"engine.zero_stage={stage}", f"engine.micro_batch={size}"]
            yield words, _with(config, zero_stage=stage, micro_batch=size)


def _with(config: TrainConfig, **fields: object) -> TrainConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=fields)})


def _halves(rows: int) -> Iterator[int]:
    """About half, a quarter and so on: sizes that leave no row over."""
    size = rows
    while size > 1:
        size = next(smaller for smaller in range(size // 2, 0, -1) if rows % smaller == 0)
        yield size


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB"
