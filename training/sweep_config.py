"""What a sweep searches, and how a trial's values are drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from training import noise
from training.errors import ConfigError

_NOT_SEARCHED = {
    "name": "a trial is named by its number",
    "steps": "the sweep's own steps are every trial's",
    "data": "losses on other pictures do not compare",
    "conditioning": "losses of networks that are told other things do not compare",
    "latents": "losses of other latents do not compare",
    "evaluation": "losses measured another way do not compare",
    "checkpoint": "the sweep keeps its trials' checkpoints itself",
    "tracking": "all trials belong to the sweep's own MLflow run",
    "model": "a whole section would carry the resolution along; name one of its fields",
    "model.resolution": "losses of pictures of another size do not compare",
}
"""Fields, and sections with all their fields, that would change what is measured or how trials are kept; and why."""
_SEARCHED = [
    *("seed", "global_batch", "model.* but resolution", "objective.*", "optimizer.*", "schedule.*", "ema.*"),
    *("engine.*", "workers.*"),
]
_FORMS = ["choice(a, b, ...)", "uniform(low, high)", "loguniform(low, high)"]


class Choice(BaseModel):
    """One of several values; trial ``i`` of ``n`` values gets each in turn before any comes twice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["choice"] = "choice"
    """Chooses this form."""
    values: tuple[Any, ...] = Field(min_length=1)
    """What to choose from."""

    def draw(self, seed: int, key: str, trial: int) -> Any:
        """The value of trial number ``trial``."""
        around, place = divmod(trial, len(self.values))
        order = noise.generator(seed, "sweep", key, around).permutation(len(self.values))
        return self.values[int(order[place])]


class Uniform(BaseModel):
    """A number between two bounds, even or even in its logarithm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["uniform", "loguniform"]
    """Chooses this form."""
    low: float
    """The lower bound."""
    high: float
    """The upper bound."""

    def draw(self, seed: int, key: str, trial: int) -> float:
        """The value of trial number ``trial``."""
        share = float(noise.generator(seed, "sweep", key, trial).random())
        if self.kind == "loguniform":
            return float(f"{math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low))):.4g}")
        return float(f"{self.low + share * (self.high - self.low):.4g}")


Domain = Annotated[Choice | Uniform, Field(discriminator="kind")]
"""Every form of a search; the union is the registry."""


class SweepConfig(BaseModel):
    """A random search, halved by ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning")."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int = Field(default=4, ge=1)
    """How many sets of values are tried."""
    steps: int = Field(default=100, ge=1)
    """Optimizer steps of a trial that is never stopped."""
    grace_steps: int = Field(default=25, ge=1)
    """Steps before a trial may be stopped; evaluations happen this often."""
    reduction: float = Field(default=2.0, gt=1)
    """At each rung the best ``1 / reduction`` go on."""
    concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; None takes what the cluster's CPUs and GPUs allow."""
    seed: int = Field(default=0, ge=0)
    """Keys the draws."""
    space: Mapping[str, Domain]
    """Recipe fields, by dotted path, and what they may be. Not those that change the measure or the bookkeeping."""

    @field_validator("space")
    @classmethod
    def _compares(cls, space: Mapping[str, Domain]) -> Mapping[str, Domain]:
        """Refuse fields after which the trials' losses would not compare.

        Raises:
            ConfigError: which field, and why.
        """
        for key in space:
            section = key.split(".")[0]
            why = _NOT_SEARCHED.get(key) or (None if section == "model" else _NOT_SEARCHED.get(section))
            if why:
                raise ConfigError(f"A sweep cannot search {key}.", value=key, rule=why, options=_SEARCHED)
        return space

    def values(self, trial: int) -> dict[str, Any]:
        """The recipe fields of one trial, a function of ``(seed, field, trial)`` alone."""
        return {key: domain.draw(self.seed, key, trial) for key, domain in self.space.items()}


def parse_domain(text: str) -> tuple[str, Choice | Uniform]:
    """Read ``section.key=loguniform(1e-4, 1e-2)``.

    Raises:
        ConfigError: not of that form.
    """
    match = re.fullmatch(r"\s*([\w.]+)\s*=\s*(\w+)\((.*)\)\s*", text)
    kind = match.group(2) if match else ""
    if not match or kind not in {"choice", "uniform", "loguniform"}:
        raise ConfigError("A search cannot be read.", value=text, rule="section.key=form", options=_FORMS)
    try:
        values = [_number(value) for value in yaml.safe_load(f"[{match.group(3)}]")]
    except yaml.YAMLError:
        raise ConfigError("A search's values cannot be read.", value=text, rule="values between commas") from None
    if kind == "choice":
        if not values:
            raise ConfigError("A choice needs values.", value=text, rule=_FORMS[0])
        return match.group(1), Choice(values=tuple(values))
    if len(values) != 2 or not all(isinstance(value, int | float) for value in values) or values[0] >= values[1]:
        raise ConfigError("A range needs two numbers, the lower first.", value=text, rule=f"{kind}(low, high)")
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError("A logarithm needs positive bounds.", value=text, rule="loguniform(low > 0, high)")
    return match.group(1), Uniform(
        kind="loguniform" if kind == "loguniform" else "uniform", low=values[0], high=values[1]
    )


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; nobody who writes it means text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
