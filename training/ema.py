"""The averages of the weights: an exponential one, and those from which any length is made afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from training.ema_post_hoc import LONGEST, PowerProfile

if TYPE_CHECKING:
    import torch

    from training.engine_state import Part, StateSource


Length = Annotated[float, Field(gt=0, lt=LONGEST)]
"""Of an average, as a share of the training."""


class PostHocConfig(BaseModel):
    """Averages kept at intervals, from which one of any length is put together after training.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lengths: tuple[Length, ...] = Field(default=(0.05, 0.10), min_length=1)
    """The lengths that are tracked, as shares of the training so far (the paper's relative standard deviation). Two
    cover all between them and some way beyond."""
    every_steps: int = Field(default=500, ge=1)
    """Steps between two snapshots of them."""


class EmaConfig(BaseModel):
    """How long the average remembers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(default=0.995, ge=0, lt=1)
    """Weight of the past at each step, once warm."""
    post_hoc: PostHocConfig | None = None
    """Keeps snapshots from which an average of another length can be made; None keeps none."""
    publish_length: Length | None = None
    """The length of the average that is published, made from the snapshots; None publishes that of ``decay``."""

    def decay_at(self, updates: int) -> float:
        """The decay for the update after ``updates`` others: short at first, so that the start is forgotten.

        ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow's ExponentialMovingAverage(num_updates).
        """
        return min(self.decay, (1 + updates) / (10 + updates))


def group_of(length: float) -> str:
    """What the parts of a tracked average are called."""
    return f"ema_{round(1000 * length):03d}"


class Ema:
    """Averages the elements of the weights that this rank answers for; nowhere is an average held twice.

    Args:
        config: how long the average remembers.
        weights: this rank's parts of them, live: the optimizer updates them in place and they are read here.
        device: where the collectives work.
        average_into: fills in the average where the optimizer makes it itself.
    """

    def __init__(
        self,
        config: EmaConfig,
        weights: Sequence[Part],
        device: torch.device,
        average_into: Callable[[list[torch.Tensor]], None] | None = None,
    ) -> None:
        self.config, self.device, self._average_into = config, device, average_into
        self.live = [part.values.detach() for part in weights]
        self.average = [tensor.clone() for tensor in self.live]
        self._profiles = [PowerProfile.of(length) for length in (config.post_hoc.lengths if config.post_hoc else ())]
        self._tracked = [[tensor.clone() for tensor in self.live] for _ in self._profiles]
        self._parts = _parts("ema", weights, self.average)
        self.tracked: list[Part] = []
        for profile, averages in zip(self._profiles, self._tracked, strict=True):
            self.tracked += _parts(group_of(profile.length), weights, averages)
        self._all = self._parts + self.tracked

    def update(self, updates: int) -> None:
        """Move the averages towards the live weights, after the optimizer's step number ``updates``, 0-based."""
        import torch

        if not self.average:
            return
        if self._average_into is not None:
            self._average_into(self.average)
        else:
            torch._foreach_lerp_(self.average, self.live, 1 - self.config.decay_at(updates))
        for profile, averages in zip(self._profiles, self._tracked, strict=True):
            torch._foreach_lerp_(averages, self.live, 1 - profile.decay(updates + 1))

    def parts(self) -> list[Part]:
        """This rank's part of the averages: views of them, and the same list each time."""
        return self._all

    def take(self, source: StateSource) -> None:
        """Be the averages that a source holds. Every rank calls it.

        Raises:
            CheckpointError: they are another network's, or a tracked one is not among them.
        """
        from training import ranks
        from training.engine_state import read_into

        ranks.on_every_rank(lambda: self._check(source))  # one that refuses must not leave others waiting
        read_into(self._all, source)

    def _check(self, source: StateSource) -> None:
        from training.engine_state import check_shapes

        expected = {part.name: part.shape for part in self._parts}
        for group in {part.group for part in self._all}:
            found = source.shapes(group)
            check_shapes({name: found[name] for name in expected if name in found}, expected)

    def whole(self) -> dict[str, torch.Tensor]:
        """The whole average by the weights' names, fp32, on every rank's CPU. Every rank calls it."""
        from training.engine_state import gather

        return {name: tensor.cpu() for name, tensor in gather(self._parts, self.device).items()}


def _parts(group: str, weights: Sequence[Part], values: Sequence[torch.Tensor]) -> list[Part]:
    from training.engine_state import Part

    return [
        Part(group, part.name, part.shape, part.start, tensor) for part, tensor in zip(weights, values, strict=True)
    ]
