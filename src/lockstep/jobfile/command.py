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
    if not words:
        raise UserError("no training command; give it after --, such as: -- pretrain-gpt --num-layers 2 ...")
    program, arguments = words[0], list(words[1:])
    script = _SCRIPTS.get(PurePosixPath(program).name)
    if program not in _DOORS and script is None:
        raise UserError(
            f"the training command begins with {program!r}; begin it with pretrain-gpt, train, or the path of "
            f"{' or '.join(_SCRIPTS)}.{nearest(program, _DOORS)}"
        )
    resolve(_parse(script or program, arguments), world_size=world_size)
    return [program, *arguments] if script else ["-m", "lockstep.cli", program, *arguments]


def _parse(door: str, arguments: Sequence[str]) -> ConfigContainer:
    if door == "pretrain-gpt":
        from lockstep.megatron_lm.parser import parse_flags

        return parse_flags(arguments)
    from lockstep.recipes.door import parse_recipe_args

    return parse_recipe_args(arguments)
