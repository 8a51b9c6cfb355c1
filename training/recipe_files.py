"""Where the packaged recipes are; read without anything else."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))
