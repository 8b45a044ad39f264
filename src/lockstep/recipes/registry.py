"""How a recipe is written: a function without arguments that returns a config tree, registered under its name."""

from collections.abc import Callable, Mapping
from typing import Any

from lockstep.config import ConfigContainer, Origin

Recipe = Callable[[], ConfigContainer]

RECIPES: dict[str, Recipe] = {}


def recipe(build: Recipe) -> Recipe:
    """Register a recipe under its function's name."""
    RECIPES[build.__name__] = build
    return build


def from_differences(name: str, differences: Mapping[str, Any]) -> ConfigContainer:
    """Return the default tree with ``differences`` (dotted path to value) applied in the name of a recipe."""
    config = ConfigContainer()
    for path, value in differences.items():
        config.set(path, value, Origin("recipe", name))
    return config
