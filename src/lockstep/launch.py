"""From a door's config tree to a run: resolve, then print or train."""

import os
import shlex
from collections.abc import Sequence

from lockstep.config import ConfigContainer, resolve
from lockstep.config.show import format_tree
from lockstep.errors import ConfigError
from lockstep.lasting import lasting_imports
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
    show_samples: int | None = None,
) -> int:
    """Resolve a tree and train it, or only print it or so many of its samples; return the exit code.

    ``name`` is the parent folder of the run directory, ``recipe`` the one the overrides spelling is relative to.

    Raises:
        UserError: the tree cannot run, or the run met data it cannot use.
    """
    resolved = resolve(config, world_size=int(os.environ.get("WORLD_SIZE") or 1))
    if print_only:
        if os.environ.get("RANK", "0") == "0":
            print(format_tree(resolved))
        return 0
    if show_samples is not None:
        if os.environ.get("RANK", "0") == "0":
            _show_samples(resolved, show_samples)
        return 0
    with lasting_imports():
        from lockstep.training import Command, run

    command = Command(argv=list(argv), flags=_as_flags(config), overrides=_as_overrides(config, recipe))
    run(resolved, door=door, command=command, name=name)
    return 0


def _show_samples(config: ConfigContainer, count: int) -> None:
    from lockstep.data.sft.show import show
    from lockstep.data.tokenizers import build_tokenizer

    assert config.model.seq_length is not None, "a resolved tree has a sample length"
    assert config.dataset.random_seed is not None, "a resolved tree has a data seed"
    tokenizer = build_tokenizer(config.tokenizer)
    show(config.dataset, tokenizer, seq_length=config.model.seq_length, seed=config.dataset.random_seed, count=count)


def _as_flags(config: ConfigContainer) -> str | None:
    try:
        return "pretrain_gpt.py " + shlex.join(flags_from_config(config))
    except ConfigError:
        return None


def _as_overrides(config: ConfigContainer, recipe: str) -> str:
    return f"run_recipe.py --recipe {recipe} " + shlex.join(overrides_from_config(config, recipe))
