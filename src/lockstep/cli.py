"""The ``lockstep`` command: one subcommand a job, each imported when it is asked for."""

import argparse
import sys
from collections.abc import Callable, Sequence

from lockstep import __version__
from lockstep.guard import run


def pretrain_gpt(argv: Sequence[str]) -> int:
    """Train with Megatron-LM's flags."""
    from lockstep.megatron_lm.door import main as door

    return door(argv)


def train(argv: Sequence[str]) -> int:
    """Train by a recipe with overrides, as Megatron Bridge's run_recipe.py does."""
    from lockstep.recipes.door import main as door

    return door(argv)


def recipes(argv: Sequence[str]) -> int:
    """List the recipes: sizes, layouts, and what they need of each GPU."""
    from lockstep.recipes.listing import main as command

    return command(argv)


def translate(argv: Sequence[str]) -> int:
    """Translate Megatron-LM's flags into a recipe with overrides, and back."""
    from lockstep.translation.cli import main as command

    return command(argv)


_DOORS: dict[str, Callable[[Sequence[str]], int]] = {
    "pretrain-gpt": pretrain_gpt,
    "train": train,
    "recipes": recipes,
    "translate": translate,
}


_OF_THE_CORE = ("pretrain-gpt", "train", "recipes")
"""The commands that the core in use answers; all others are this tree's."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of everything but the doors, whose words are their own."""
    from lockstep.core.cli import register as register_core
    from lockstep.data.cli import register as register_data
    from lockstep.generation.cli import register as register_generate
    from lockstep.hf.cli import register as register_convert
    from lockstep.jobfile.cli import register as register_jobfile
    from lockstep.lab.bisect.cli import register as register_bisect
    from lockstep.lab.calibration.cli import register as register_calibrate
    from lockstep.lab.cli import register as register_lab
    from lockstep.lab.localise.cli import register as register_localise
    from lockstep.peft.cli import register as register_adapter
    from lockstep.plan.cli import register as register_plan
    from lockstep.record.cli import register as register_record

    parser = argparse.ArgumentParser(
        prog="lockstep",
        description="Train GPT-style models through two front doors and prove two runs are the same run.",
    )
    parser.add_argument("--version", action="version", version=f"lockstep {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, door in _DOORS.items():
        subparsers.add_parser(name, help=(door.__doc__ or "").rstrip("."), add_help=False)
    register_lab(subparsers)
    register_calibrate(subparsers)
    register_bisect(subparsers)
    register_localise(subparsers)
    register_record(subparsers)
    register_data(subparsers)
    register_jobfile(subparsers)
    register_plan(subparsers)
    register_convert(subparsers)
    register_adapter(subparsers)
    register_core(subparsers)
    register_generate(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``lockstep`` command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _DOORS:
        return run(lambda: _enter(words))
    options = build_parser().parse_args(words)
    return run(lambda: options.func(options))


def _enter(words: list[str]) -> int:
    """Run a door's command: by the core in use, which most often is this very code."""
    if words[0] in _OF_THE_CORE:
        from lockstep.core.enter import run_in_core

        ended = run_in_core(words)
        if ended is not None:
            return ended
    return _DOORS[words[0]](words[1:])


if __name__ == "__main__":
    sys.exit(main())
