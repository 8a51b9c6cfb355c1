"""Width transfer: the learning rate that suits a narrow network suits a wide one (maximal update parametrisation).

Yang et al. 2022, "Tensor Programs V", table 3, column Adam; for diffusion transformers Zheng et al. 2025, "Scaling
Diffusion Transformers Efficiently via muP". With ``m`` the ratio of a layer's inputs to those it has in the base:

| weight                                   | initial deviation        | learning rate |
|------------------------------------------|--------------------------|---------------|
| from a fixed width to a growing one      | the base's               | as it is      |
| between growing widths (hidden)          | the base's, 1/sqrt(m)    | 1/m           |
| from a growing width to a fixed (output) | the base's, 1/m          | 1/m           |
| bias, embedding, gain, table             | the base's               | as it is      |

The paper's output multiplier is folded into the output's initial weights and rate (its lemma J.1), so the network stays
diffusers' own and a bundle needs to know nothing. At the base's width every factor is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from training.errors import ConfigError

if TYPE_CHECKING:
    import torch

ADAM_LIKE = ("adamw", "schedule_free")
"""Optimizers whose steps do not depend on the gradient's size, for which the table's column holds."""


class WidthTransfer(BaseModel):
    """What every family that can grow in width has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    WIDTHS: ClassVar[tuple[str, ...]] = ()
    """The family's fields that say how wide it is."""

    mup_base: dict[str, int | tuple[int, ...]] | None = None
    """The widths of the small network whose learning rate this one takes over, e.g. ``{widths: [32, 64, 128]}``; all
    else is as here. None trains in the standard parametrisation, where the best rate falls as the width grows."""

    @model_validator(mode="after")
    def _base_differs_in_width(self) -> Self:
        if self.mup_base is None:
            return self
        if not set(self.mup_base) <= set(self.WIDTHS):
            raise ValueError(f"mup_base names {sorted(self.mup_base)}; what grows is {', '.join(self.WIDTHS)}")
        try:
            base = self.base()
        except ValidationError as error:
            raise ValueError(f"mup_base: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
        for name in self.mup_base:
            here, there = getattr(self, name), getattr(base, name)
            if isinstance(here, tuple) and len(here) != len(there):
                raise ValueError(f"mup_base.{name} has {len(there)} levels where the network has {len(here)}")
        return self

    def base(self) -> Self | None:
        """The small network's config; None without one."""
        if self.mup_base is None:
            return None
        return type(self).model_validate({**self.model_dump(), **self.mup_base, "mup_base": None})


@dataclass(frozen=True)
class Scale:
    """What becomes of one weight.

    Attributes:
        rate: its learning rate's factor.
        start: its fresh values' factor.
    """

    rate: float = 1.0
    start: float = 1.0


def scales(network: torch.nn.Module, base: torch.nn.Module) -> dict[str, Scale]:
    """The factors of every weight of ``network``, by name.

    How a family draws its fresh weights is its own matter: what they must be multiplied with is told by their
    deviations, here and in the base. Weights that start at one value keep it.

    Args:
        network: with fresh weights.
        base: the same one, fresh as well, at the widths where every factor is 1.

    Raises:
        ConfigError: the two differ in more than their widths, or their attention heads grow instead of their number.
    """
    import torch

    _check_alike(network, base)
    small = dict(base.named_parameters())
    found = {name: Scale(1.0, _start(weight, small[name], 0.0)) for name, weight in network.named_parameters()}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd):
            path = f"{name}.weight" if name else "weight"
            outputs, inputs = (module.weight.shape[side] / small[path].shape[side] for side in (0, 1))
            power = 0.0 if inputs == 1 else 0.5 if outputs != 1 else 1.0
            found[path] = Scale(1 / inputs, _start(module.weight, small[path], power))
    return found


def _start(weight: torch.Tensor, small: torch.Tensor, power: float) -> float:
    """What gives fresh values the base's deviation over the ``power`` of the inputs' ratio."""
    if weight.shape == small.shape:
        return 1.0
    here, there = (float(values.detach().float().std(correction=0)) for values in (weight, small))
    if here == 0 or there == 0:
        return 1.0
    inputs = 1.0 if power == 0 else weight.shape[1] / small.shape[1]
    return float(there * inputs**-power / here)


def restart(network: torch.nn.Module, factors: Mapping[str, Scale]) -> None:
    """Give fresh weights the sizes that the table asks for."""
    import torch

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if factors[name].start != 1:
                parameter.mul_(factors[name].start)


def transferred(network: torch.nn.Module, model: object, build: Callable[[Any], torch.nn.Module]) -> dict[str, float]:
    """Give a fresh network the sizes that its recipe's base asks for.

    Args:
        network: fresh, as ``model`` describes it.
        model: the recipe's section; without a base nothing happens.
        build: makes the fresh network of another such section.

    Returns:
        The factors of the learning rate by the weight's name, where they are not 1.

    Raises:
        ConfigError: as ``scales``.
    """
    import torch

    base = model.base() if isinstance(model, WidthTransfer) else None
    if base is None:
        return {}
    with torch.random.fork_rng(devices=[]):
        small = build(base)
    factors = scales(network, small)
    restart(network, factors)
    return {name: factor.rate for name, factor in factors.items() if factor.rate != 1}


def check_optimizer(model: object, kind: str) -> None:
    """The table is of Adam: other optimizers' steps grow otherwise.

    Raises:
        ValueError: the model takes over a base's learning rate, and the optimizer cannot.
    """
    if getattr(model, "mup_base", None) is not None and kind not in ADAM_LIKE:
        raise ValueError(f"model.mup_base transfers the rate of {' or '.join(ADAM_LIKE)}, not of {kind}")


def _check_alike(network: torch.nn.Module, base: torch.nn.Module) -> None:
    here, there = dict(network.named_parameters()), dict(base.named_parameters())
    for name in sorted(set(here) ^ set(there)):
        raise ConfigError(
            "model.mup_base is another network.", value=name, rule="the same weights, in other widths only"
        )
    for name, module in network.named_modules():
        heads = getattr(module, "heads", None)
        if not isinstance(heads, int) or not hasattr(module, "to_q"):
            continue
        small: Any = base.get_submodule(name)
        widths = [each.to_q.weight.shape[0] // each.heads for each in (module, small)]
        if widths[0] != widths[1]:
            raise ConfigError(
                f"model.mup_base changes the width of an attention head ({name}).",
                value=widths[1],
                rule=f"{widths[0]}, as in the network: more heads, not wider ones",
            )
