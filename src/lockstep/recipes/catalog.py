"""All recipes by name; importing this imports every family."""

from lockstep.config import ConfigContainer
from lockstep.errors import ConfigError, nearest
from lockstep.recipes import deepseek, gpt, llama, llama_tuning, qwen, qwen_tuning  # noqa: F401  (registers their recipes)
from lockstep.recipes.registry import RECIPES, Recipe


def describe_recipes() -> list[tuple[str, str]]:
    """Return every recipe's name and the first line of its docstring."""
    return [(name, found.summary) for name, found in sorted(RECIPES.items())]


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name or by NVIDIA's long one.

    Raises:
        ConfigError: no such recipe; names the nearest ones.
    """
    by_name = RECIPES | {found.long_name: found for found in RECIPES.values() if found.long_name}
    if name in by_name:
        return by_name[name]
    hint = nearest(name if name.endswith("_config") else f"{name}_pretrain_config", by_name) or nearest(name, by_name)
    hint = hint or f" Known recipes: {', '.join(sorted(RECIPES))}."
    raise ConfigError(f"unknown recipe {name}.{hint}")


def get_recipe(name: str) -> ConfigContainer:
    """Return the config tree of a recipe, given its name or NVIDIA's long one.

    Raises:
        ConfigError: no such recipe; names the nearest ones.
    """
    return find_recipe(name).build()
