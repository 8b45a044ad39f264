"""The recipes by name. A recipe is a function without arguments that returns a config tree."""

from collections.abc import Callable, Mapping
from typing import Any

from lockstep.config import ConfigContainer, Origin
from lockstep.errors import ConfigError, nearest

Recipe = Callable[[], ConfigContainer]

_RECIPES: dict[str, Recipe] = {}


def recipe(build: Recipe) -> Recipe:
    """Register a recipe under its function's name."""
    _RECIPES[build.__name__] = build
    return build


def from_differences(name: str, differences: Mapping[str, Any]) -> ConfigContainer:
    """Return the default tree with ``differences`` (dotted path to value) applied in the name of a recipe."""
    config = ConfigContainer()
    for path, value in differences.items():
        config.set(path, value, Origin("recipe", name))
    return config


def describe_recipes() -> list[tuple[str, str]]:
    """Return every recipe's name and the first line of its docstring."""
    _load()
    return [(name, (build.__doc__ or "").partition("\n")[0]) for name, build in sorted(_RECIPES.items())]


def get_recipe(name: str) -> ConfigContainer:
    """Return the config tree of a recipe.

    Raises:
        ConfigError: no such recipe; names the nearest ones.
    """
    _load()
    if name not in _RECIPES:
        hint = nearest(name, _RECIPES) or nearest(f"{name}_pretrain_config", _RECIPES)
        hint = hint or f" Known recipes: {', '.join(sorted(_RECIPES))}."
        raise ConfigError(f"unknown recipe {name}.{hint}")
    return _RECIPES[name]()


def _load() -> None:
    """Import the modules that register recipes."""
    import lockstep.recipes.gpt  # noqa: F401
