"""The config tree spelled as a recipe with overrides."""

import re
from typing import Any

from lockstep.config import ConfigContainer
from lockstep.config.derive import interpolate
from lockstep.recipes.catalog import get_recipe
from lockstep.words import is_number

DEFAULT_RECIPE = "vanilla_gpt_pretrain_config"
"""The recipe that a run is spelled by where none is named."""

_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.@%+-]*")
_WORDS_OF_THE_GRAMMAR = {"true", "false", "null", "nan", "inf"}


def overrides_from_config(config: ConfigContainer, recipe: str = DEFAULT_RECIPE) -> list[str]:
    """Return the overrides that turn ``recipe`` into ``config``: one for each field whose value differs.

    Raises:
        ConfigError: no such recipe.
    """
    config = config.copy()
    interpolate(config)
    base = get_recipe(recipe)
    return [f"{info.path}={spell(value)}" for info, value, _ in config.items() if value != base.get(info.path)]


def spell(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(spell(item) for item in value) + "]"
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and value.lower() not in _WORDS_OF_THE_GRAMMAR and not is_number(value):
            return value
        return quoted(value, '"')
    return str(value)


def quoted(text: str, quote: str) -> str:
    """Return a text in quotes of Hydra's grammar, where a backslash is one unless a quote follows it."""
    escaped = re.sub(r"(\\*)(" + quote + "|$)", lambda m: m[1] * 2 + (m[2] and "\\" + m[2]), text)
    return f"{quote}{escaped}{quote}"
