"""From a door's config tree to a run: resolve, then print or train."""

import os
import shlex
from collections.abc import Sequence

from lockstep.config import ConfigContainer, resolve
from lockstep.config.show import format_tree
from lockstep.errors import ConfigError
from lockstep.megatron_lm.translate import flags_from_config
from lockstep.recipes.translate import DEFAULT_RECIPE, overrides_from_config


def launch(
    config: ConfigContainer,
    *,
    door: str,
    name: str,
    argv: Sequence[str],
    recipe: str = DEFAULT_RECIPE,
    print_only: bool = False,
) -> int:
    """Resolve a tree and train it, or only print it; return the exit code.

    ``name`` is the parent folder of the run directory, ``recipe`` the one the overrides spelling is relative to.

    Raises:
        UserError: the tree cannot run, or the run met data it cannot use.
    """
    resolved = resolve(config, world_size=int(os.environ.get("WORLD_SIZE") or 1))
    if print_only:
        if os.environ.get("RANK", "0") == "0":
            print(format_tree(resolved))
        return 0
    from lockstep.training import Command, run

    command = Command(argv=list(argv), flags=_as_flags(config), overrides=_as_overrides(config, recipe))
    run(resolved, door=door, command=command, name=name)
    return 0


def _as_flags(config: ConfigContainer) -> str | None:
    try:
        return "pretrain_gpt.py " + shlex.join(flags_from_config(config))
    except ConfigError:
        return None


def _as_overrides(config: ConfigContainer, recipe: str) -> str:
    return f"run_recipe.py --recipe {recipe} " + shlex.join(overrides_from_config(config, recipe))
