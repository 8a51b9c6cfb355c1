"""LoRAs beside the network that a replica serves: which one its calls run with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.errors import RequestError, ServeError
from training.errors import ConfigError, UsageError


class Adapters:
    """The LoRAs of one network; at most one of them works at a time.

    They stay beside its weights and are not merged into them: without one, the network's bits are what they were.

    Args:
        network: a diffusers model without adapters; None where there is nothing to adapt.
        places: of each adapter, by its name: a file, a directory with one, or a bundle whose ``adapter/`` has it.

    Attributes:
        active: the name of the one that works; None is none.

    Raises:
        ServeError: one does not load, or is of another network.
    """

    def __init__(self, network: Any = None, places: Mapping[str, Path] | None = None) -> None:
        self.names = tuple(places or {})
        self.active: str | None = None
        for name, place in (places or {}).items():
            _add(network, name, place)
        self._layers = _layers(network) if self.names else []
        self._switch(None)

    def check(self, name: str | None) -> None:
        """Refuse an adapter that is not here.

        Raises:
            RequestError: with those that are.
        """
        if name is not None and name not in self.names:
            error = UsageError(
                "There is no such adapter.",
                value=name[:80],
                rule="an adapter that this server has beside its model",
                options=self.names,
                mend=None if self.names else "leave it out: this server has none",
            )
            raise RequestError(error, param="adapter")

    def activate(self, name: str | None) -> None:
        """Let the network's next calls run with this adapter, or with none; on the thread that calls it."""
        if name != self.active:
            self._switch(name)

    def _switch(self, name: str | None) -> None:
        for layer in self._layers:
            layer.enable_adapters(enabled=name is not None)
            if name is not None:
                layer.set_adapter(_inside(name), inference_mode=True)
        self.active = name


def adapter_path(name: str, place: str) -> Path:
    """The file of an adapter, absolute.

    Args:
        name: of the adapter, for the error.
        place: a file, a directory with one, or a bundle of a run that trained one, which keeps it in ``adapter/``.

    Raises:
        ServeError: it is not there.
    """
    from training.finetune.adapters import adapter_file

    path = Path(place).expanduser().resolve()
    inner = path / "adapter"
    try:
        return adapter_file(inner if inner.is_dir() else path)
    except ConfigError as error:
        raise _refused(name, error) from error


def _add(network: Any, name: str, place: Path) -> None:
    from training.finetune.adapters import inject_kept

    path = adapter_path(name, str(place))
    try:
        with warnings.catch_warnings(category=UserWarning, action="ignore"):  # several adapters are what is wanted
            inject_kept(network, path, _inside(name))
    except ConfigError as error:
        raise _refused(name, error) from error


def _refused(name: str, error: ConfigError) -> ServeError:
    return ServeError(
        f"The adapter {name} cannot be served. {error.message}",
        value=error.value,
        rule=error.rule,
        mend="name a bundle or an adapter that was trained on this model",
    )


def _inside(name: str) -> str:
    """As peft is told it: a name of ours could be that of a module's attribute, or a part of another's."""
    return f"~{name}~"


def _layers(network: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    network.eval().requires_grad_(False)
    return found
