"""How a recipe is written: a function without arguments that returns a config tree, registered under its name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from lockstep.config import ConfigContainer, Origin

Build = Callable[[], ConfigContainer]
Task = Literal["pretrain", "sft", "peft"]
_TASK = re.compile(r"_(pretrain|sft|peft)_")


@dataclass(frozen=True)
class Recipe:
    """A recipe of the catalogue.

    Attributes:
        name: as ``--recipe`` takes it.
        build: returns its tree.
        gpus: GPUs that its layout is made for.
        long_name: NVIDIA's name with GPUs and number format, which is taken as well.
    """

    name: str
    build: Build
    gpus: int = 1
    long_name: str | None = None

    @property
    def task(self) -> Task:
        """What the recipe does, as its name says; one that says nothing trains from scratch."""
        found = _TASK.search(self.name)
        return cast(Task, found[1]) if found else "pretrain"

    @property
    def stem(self) -> str:
        """The name without what the recipe does."""
        return _TASK.split(self.name)[0]

    @property
    def summary(self) -> str:
        """The first line of what the recipe says of itself."""
        return (self.build.__doc__ or "").partition("\n")[0]


RECIPES: dict[str, Recipe] = {}


def recipe(build: Build) -> Build:
    """Register a recipe under its function's name."""
    RECIPES[build.__name__] = Recipe(build.__name__, build)
    return build


def recipe_for(gpus: int, long_name: str | None = None) -> Callable[[Build], Build]:
    """Register a recipe under its function's name and NVIDIA's long one, if it has the recipe.

    ``gpus`` are those that its layout is made for.
    """

    def register(build: Build) -> Build:
        RECIPES[build.__name__] = Recipe(build.__name__, build, gpus, long_name)
        return build

    return register


def from_differences(name: str, *differences: Mapping[str, Any], parent: Build = ConfigContainer) -> ConfigContainer:
    """Return the parent's tree (the defaults) with ``differences`` (dotted path to value) in the name of a recipe."""
    config = parent()
    for path, value in (item for values in differences for item in values.items()):
        config.set(path, value, Origin("recipe", name))
    return config
