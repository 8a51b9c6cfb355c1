"""Averages whose length is chosen after training (Karras et al. 2024, EDM2, section 3 and appendix C).

An average with a power profile weighs the weights of step ``t`` of ``T`` with ``t**gamma``. Its length is the profile's
standard deviation as a share of ``T``. Snapshots of a few such averages span others, by least squares of the profiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LONGEST = 0.28
"""Of a profile that does not fall towards the end, ``gamma`` 0, it is 0.2887."""


@dataclass(frozen=True)
class PowerProfile:
    """The weights that an average gives to the steps so far.

    Attributes:
        length: standard deviation as a share of the training so far; the paper's sigma_rel.
        gamma: the exponent.
    """

    length: float
    gamma: float

    @classmethod
    def of(cls, length: float) -> PowerProfile:
        """From its length: ``length**2 = (gamma + 1) (gamma + 2)**-2 (gamma + 3)**-1`` (eq. 126).

        Raises:
            ValueError: no profile has that length.
        """
        import numpy as np

        if not 0 < length < LONGEST:
            raise ValueError(f"an average's length is above 0 and below {LONGEST}, not {length}")
        inverse = length**-2
        return cls(length, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))

    def decay(self, step: int) -> float:
        """The weight of the past at ``step``, 1-based: ``(1 - 1/t)**(gamma + 1)`` (eq. 127)."""
        return float((1 - 1 / step) ** (self.gamma + 1))


@dataclass(frozen=True)
class Snapshot:
    """An average as it was at some step.

    Attributes:
        step: steps done.
        length: its profile's.
    """

    step: int
    length: float


def coefficients(kept: Sequence[Snapshot], wanted: Snapshot) -> np.ndarray:
    """The factors of snapshots whose sum is nearest to a wanted average (algorithm 3).

    Args:
        kept: no two alike, none later than ``wanted``.
        wanted: the average to come near to.

    Returns:
        One factor for each, float64 ``[len(kept)]``; they add up to about 1.
    """
    import numpy as np

    among = np.array([[_product(one, other) for other in kept] for one in kept])
    towards = np.array([_product(one, wanted) for one in kept])
    found: np.ndarray = np.linalg.lstsq(among, towards, rcond=None)[0]
    return found


def _product(one: Snapshot, other: Snapshot) -> float:
    """The integral of two profiles' product (eq. 131 to 133)."""
    here, there = PowerProfile.of(one.length).gamma, PowerProfile.of(other.length).gamma
    power = there if one.step < other.step else -here
    ratio = math.exp(power * math.log(one.step / other.step))
    return (here + 1) * (there + 1) * ratio / ((here + there + 1) * max(one.step, other.step))
