"""All recipes by name; importing this imports every family."""

from lockstep.config import ConfigContainer
from lockstep.errors import ConfigError, nearest
from lockstep.recipes import gpt  # noqa: F401  (registers its recipes)
from lockstep.recipes.registry import RECIPES


def describe_recipes() -> list[tuple[str, str]]:
    """Return every recipe's name and the first line of its docstring."""
    return [(name, (build.__doc__ or "").partition("\n")[0]) for name, build in sorted(RECIPES.items())]


def get_recipe(name: str) -> ConfigContainer:
    """Return the config tree of a recipe.

    Raises:
        ConfigError: no such recipe; names the nearest ones.
    """
    if name not in RECIPES:
        hint = nearest(name, RECIPES) or nearest(f"{name}_pretrain_config", RECIPES)
        hint = hint or f" Known recipes: {', '.join(sorted(RECIPES))}."
        raise ConfigError(f"unknown recipe {name}.{hint}")
    return RECIPES[name]()
