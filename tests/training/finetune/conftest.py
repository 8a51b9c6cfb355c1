"""Tiny pipelines, one of each layout, made once."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def _module() -> ModuleType:
    name = "tiny_pipelines"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny pipeline by its layout; nobody may change it."""
    work, made = tmp_path_factory.mktemp("pipelines"), dict[str, Path]()

    def get(layout: str) -> Path:
        if layout not in made:
            made[layout] = _module().saved(layout, work / layout)
        return made[layout]

    return get
