"""What a recipe says of prices and of where its electricity comes from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator


class CostConfig(BaseModel):
    """The price of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: str = Field(default="EUR", pattern=r"^[A-Z]{3}$")
    """ISO 4217 code of the prices."""
    per_gpu_hour: float = Field(default=0.0, ge=0)
    """Of a GPU that a worker reserves, whether it is busy or not."""
    per_cpu_hour: float = Field(default=0.0, ge=0)
    """Of a CPU that a worker reserves."""
    energy: bool = True
    """Whether a process beside each node's training estimates energy and CO2 with codecarbon, which asks no network."""
    country: str | None = None
    """ISO 3166-1 alpha-3 code of the country whose electricity is used, for the CO2; without one, the world's mean."""

    @field_validator("country")
    @classmethod
    def _is_known(cls, country: str | None) -> str | None:
        if country is not None and country not in (known := countries()):
            near = sorted(code for code in known if code[:1] == country[:1].upper())
            raise ValueError(f"must be a code of codecarbon's table of countries, such as {', '.join(near[:12])}")
        return country

    def money(self, gpu_hours: float, cpu_hours: float) -> float | None:
        """What so many hours cost; None without prices."""
        if not (self.per_gpu_hour or self.per_cpu_hour):
            return None
        return gpu_hours * self.per_gpu_hour + cpu_hours * self.per_cpu_hour


def countries() -> frozenset[str]:
    """The countries whose mix of electricity codecarbon knows."""
    spec = importlib.util.find_spec("codecarbon")
    if spec is None or spec.origin is None:
        return frozenset()
    table = Path(spec.origin).parent / "data" / "private_infra" / "global_energy_mix.json"
    return frozenset(json.loads(table.read_text()))
