"""The factor that keeps fp16's gradients out of the range where they vanish."""

from __future__ import annotations

from collections.abc import Mapping

START, LARGEST, SMALLEST = 2.0**16, 2.0**24, 1.0
PATIENCE = 2000
"""Steps without an overflow after which the scale doubles."""


class LossScale:
    """A power of two, halved by every overflow (Micikevicius et al. 2018, section 3.2): scaling is exact.

    Attributes:
        value: the loss is multiplied with it.
        overflows: steps so far that changed nothing, because some gradient was not finite.
    """

    def __init__(self) -> None:
        self.value = START
        self.overflows = 0
        self._good = 0

    def update(self, overflow: bool) -> bool:
        """After a step; returns whether a smaller scale may help, so that the step was only one of the search."""
        if not overflow:
            self._good += 1
            if self._good == PATIENCE:
                self.value, self._good = min(2 * self.value, LARGEST), 0
            return False
        self.overflows += 1
        self._good = 0
        searching = self.value > SMALLEST
        self.value = max(self.value / 2, SMALLEST)
        return searching

    def scalars(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"loss_scale": self.value, "loss_scale.good": self._good, "loss_scale.overflows": self.overflows}

    def take(self, scalars: Mapping[str, float]) -> None:
        """Go on from a checkpoint's; one that was not trained in fp16 has none, and the search begins anew."""
        if "loss_scale" in scalars:
            self.value = scalars["loss_scale"]
            self._good = int(scalars["loss_scale.good"])
            self.overflows = int(scalars["loss_scale.overflows"])
