"""The training command of a job file, checked by the door that will read it."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from lockstep.config import ConfigContainer, resolve
from lockstep.errors import UserError, nearest

_DOORS = ("pretrain-gpt", "train")
_SCRIPTS = {"pretrain_gpt.py": "pretrain-gpt", "run_recipe.py": "train"}


def check_command(words: Sequence[str], world_size: int) -> list[str]:
    """Return what follows the interpreter for a training command: a door of ``lockstep``, or its script, and arguments.

    Raises:
        UserError: no door is named, or the door refuses the arguments for ``world_size`` processes.
    """
    _, config = read_command(words)
    resolve(config, world_size=world_size)
    program, *arguments = words
    return [*words] if _script(program) else ["-m", "lockstep.cli", program, *arguments]


def read_command(words: Sequence[str]) -> tuple[str, ConfigContainer]:
    """Return the door of a training command, and the tree that it makes of the arguments, not yet resolved.

    Raises:
        UserError: no door is named, or the door does not understand the arguments.
    """
    if not words:
        raise UserError("no training command; give it after --, such as: -- pretrain-gpt --num-layers 2 ...")
    program, arguments = words[0], list(words[1:])
    door = _script(program) or program
    if door not in _DOORS:
        raise UserError(
            f"the training command begins with {program!r}; begin it with pretrain-gpt, train, or the path of "
            f"{' or '.join(_SCRIPTS)}.{nearest(program, _DOORS)}"
        )
    return door, _parse(door, arguments)


def _script(program: str) -> str | None:
    """Return the door of the script at a path."""
    return _SCRIPTS.get(PurePosixPath(program).name)


def _parse(door: str, arguments: Sequence[str]) -> ConfigContainer:
    if door == "pretrain-gpt":
        from lockstep.megatron_lm.parser import parse_flags

        return parse_flags(arguments)
    from lockstep.recipes.door import parse_recipe_args

    return parse_recipe_args(arguments)
