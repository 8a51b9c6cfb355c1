"""A step that finds no memory says of which batch, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from training import device as devices
from training import footprint, forecast, memory_forecast
from training.config import TrainConfig
from training.data.batch import Batch
from training.errors import DarkroomError, TrainingError
from training.loop import Step
from training.memory_forecast import Device, gib
from training.stopwatch import Stopwatch

CPU_REFUSALS = ("DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
"""What torch says, in a RuntimeError, where the machine refuses it memory."""


class SaysWhatFits:
    """A step whose failures for want of memory are told in words; otherwise it is ``step``.

    Args:
        step: takes the steps.
        config: the recipe.
        world: workers.
        device: that this worker computes on.
    """

    def __init__(self, step: Step, config: TrainConfig, world: int, device: torch.device) -> None:
        self._step, self._config, self._world, self._device = step, config, world, device

    def __call__(self, step: int, batch: Batch, clock: Stopwatch) -> Mapping[str, float]:
        """Take the step.

        Raises:
            TrainingError: the device has no memory for it.
        """
        with self._told(step, batch, clock):
            return self._step(step, batch, clock)

    @contextmanager
    def _told(self, step: int, batch: Batch, clock: Stopwatch) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            where = clock.failed or "its preparation"
        else:
            return
        # outside of the handler: the traceback holds the activations, and what follows needs room
        raise self._error(step, batch, where, reason)

    def _error(self, step: int, batch: Batch, where: str, reason: str) -> TrainingError:
        config, cuda = self._config, self._device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
        rows = memory_forecast.rows_of(config, self._world)
        shape = "x".join(str(side) for side in batch.images.shape[1:])
        return TrainingError(
            f"There is no memory for step {step + 1}: it ran out in {where}.",
            value=f"{rows} rows of {shape} in a micro-batch, {len(batch)} in this worker's batch, bucket {batch.bucket}"
            f" at position {batch.position}",
            rule=reason,
            options=self._options(cuda),
            mend="the same command with one of the options as --set goes on from the newest state",
        )

    def _options(self, cuda: bool) -> list[str]:
        precision = devices.precision_on(self._config, torch.cuda.get_device_name(self._device) if cuda else None)
        lean = self._config.model_copy(
            update={"engine": self._config.engine.model_copy(update={"gradient_checkpointing": True})}
        )
        try:
            told = forecast.told_shape(self._config)
            found = footprint.measure(self._config, told, precision)
            checkpointed = None if lean == self._config else footprint.measure(lean, told, precision)
        except (DarkroomError, MemoryError, RuntimeError):  # there may be no memory even for that
            return [f"engine.micro_batch={max(1, memory_forecast.rows_of(self._config, self._world) // 2)}"]
        device = Device("GPU" if cuda else "CPU", None, None, 0)
        needed = memory_forecast.forecast(self._config, found, self._world, device).total_bytes
        # what was asked for did not fit: whatever the device says of its size, less would have
        room = min(_memory_bytes(self._device), needed - 1)
        limited = replace(device, memory_bytes=room)
        fitting = memory_forecast.what_fits(self._config, found, self._world, limited, checkpointed)
        return [*fitting, f"more than {gib(needed)} for a worker, by the forecast"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was refused."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in CPU_REFUSALS)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return devices.node_memory_bytes()
