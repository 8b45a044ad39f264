"""``lockstep translate``: Megatron-LM flags into a recipe with overrides, and back."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.arguments import StrictParser
from lockstep.errors import ConfigError, nearest
from lockstep.recipes.catalog import find_recipe
from lockstep.recipes.translate import DEFAULT_RECIPE
from lockstep.translation import bridge
from lockstep.translation.emit import FORMATS, emit
from lockstep.translation.flags import read_flags
from lockstep.translation.nemo import is_nemo, read_nemo
from lockstep.translation.report import as_json, summary
from lockstep.translation.reverse import read_overrides, split_override, to_flags
from lockstep.translation.shell import read_script
from lockstep.translation.sources import define, split_args, yaml_flags, yaml_overrides
from lockstep.translation.translate import Translation, to_bridge, to_lockstep
from lockstep.translation.words import Word

COMPLETE, BLOCKED = 0, 1
_MAY_BEGIN_WITH_A_DASH = ("--args", "--waive")


def build_parser(prog: str = "lockstep translate") -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = StrictParser(
        prog=prog,
        description="Translate a Megatron-LM command into a recipe with overrides, or back with --reverse.",
        epilog="Exit code: 0 the same run, 1 some option blocks, 2 the input cannot be read.",
        help_column=32,
    )
    source = parser.add_argument_group("what to translate")
    source.add_argument("--args", metavar='"..."', help="Flags; with --reverse key=value overrides.")
    source.add_argument("--yaml", metavar="FILE", type=Path, help="MODEL_ARGS of a YAML file; with --reverse a config.")
    source.add_argument("--script", metavar="FILE", type=Path, help="A launch script; it is read, not run.")
    source.add_argument("--recipe", metavar="NAME", default=DEFAULT_RECIPE, help="Recipe that overrides change.")
    source.add_argument("--reverse", action="store_true", help="From a recipe with overrides to flags.")
    source.add_argument("--define", metavar="NAME=VALUE", action="append", default=[], help="Value of a variable.")
    target = parser.add_argument_group("what to write")
    target.add_argument(
        "--for", dest="system", choices=("lockstep", "megatron-bridge"), default="lockstep", help="Whose recipes."
    )
    target.add_argument("--bridge-version", choices=bridge.VERSIONS, default=bridge.NEWEST, help="Its key names.")
    target.add_argument("--world-size", metavar="N", type=int, help="Processes of the run.")
    target.add_argument("--waive", metavar="OPTION", action="append", default=[], help="Go on without this option.")
    target.add_argument(
        "--waive-refused",
        action="store_true",
        help="Go on without what Lockstep's trainer refuses and what changes speed, logging or paths only.",
    )
    target.add_argument("--emit", choices=FORMATS, default="overrides", help="Form of the output.")
    target.add_argument(
        "--recipe-name", metavar="NAME", default="translated_pretrain_config", help="With --emit recipe."
    )
    target.add_argument("-o", "--output", metavar="FILE", type=Path, help="Write here instead of to the terminal.")
    target.add_argument("--report", metavar="FILE.json", type=Path, help="Every option, its class and its reason.")
    return parser


@dataclass
class _Source:
    words: list[Word]
    world_size: int | None = None


def main(argv: Sequence[str], prog: str = "lockstep translate") -> int:
    """Translate; return 0 for a complete translation, 1 where an option blocks.

    Raises:
        UserError: input that cannot be read.
    """
    options = build_parser(prog).parse_args(_joined(argv))
    _check(options)
    defined = _defined(options.define)
    world_size = options.world_size
    if options.reverse:
        translation = _reversed(options, defined)
    else:
        source = _source(options, defined)
        world_size = world_size or source.world_size
        translation = _forward(options, source, world_size)
    blocking = translation.of_class("blocking")
    text = emit(translation, options.emit, name=options.recipe_name, processes=world_size or 1)
    if options.report:
        _write(options.report, as_json(translation))
    if options.output:
        _write(options.output, text)
    else:
        sys.stdout.write(text)
    sys.stderr.write(summary(translation))
    for verdict in blocking:
        name = verdict.option.written.flag
        print(f"blocked by {name}: {verdict.reason}; --waive {name} goes on without it", file=sys.stderr)
    return BLOCKED if blocking else COMPLETE


def _joined(argv: Sequence[str]) -> list[str]:
    """Join options with values that begin with a dash, which argparse would take for options."""
    words, joined, index = list(argv), [], 0
    while index < len(words):
        if words[index] in _MAY_BEGIN_WITH_A_DASH and index + 1 < len(words):
            joined.append(f"{words[index]}={words[index + 1]}")
            index += 2
        else:
            joined.append(words[index])
            index += 1
    return joined


def _check(options: argparse.Namespace) -> None:
    given = [name for name in ("args", "yaml", "script") if getattr(options, name) is not None]
    if options.reverse and options.script:
        raise ConfigError("--script holds flags, and --reverse makes flags; drop one of them")
    if not options.reverse and len(given) != 1:
        raise ConfigError('give one of --args "...", --yaml FILE and --script FILE')
    if options.reverse and options.emit == "recipe":
        raise ConfigError("--emit recipe: flags are no recipe; use overrides, yaml or command")
    if not re.fullmatch(r"[A-Za-z_]\w*", options.recipe_name):
        raise ConfigError(f"--recipe-name {options.recipe_name}: give a name that Python takes for a function")
    if options.world_size is not None and options.world_size < 1:
        raise ConfigError(f"--world-size {options.world_size}: give 1 or more")
    if options.system == "lockstep":
        find_recipe(options.recipe)


def _defined(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise ConfigError(f"--define {wrong[0]}: write NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _source(options: argparse.Namespace, defined: dict[str, str]) -> _Source:
    if options.script:
        launch = read_script(options.script, defined)
        return _Source(define(launch.words, defined), launch.world_size)
    words = yaml_flags(options.yaml) if options.yaml else split_args(options.args)
    return _Source(define(words, defined))


def _forward(options: argparse.Namespace, source: _Source, world_size: int | None) -> Translation:
    reading = read_nemo(source.words) if is_nemo(source.words) else read_flags(source.words)
    waived = _names(options.waive, reading.names())
    if options.system == "lockstep":
        return to_lockstep(reading, options.recipe, waived, options.waive_refused)
    return to_bridge(reading, options.recipe, options.bridge_version, world_size, waived)


def _names(waived: Sequence[str], known: set[str]) -> list[str]:
    """Return the options to waive as they are written; leading dashes may be left out."""
    names = []
    for name in waived:
        found = next((n for n in known if n.lstrip("-") == name.lstrip("-")), None)
        if found is None:
            raise ConfigError(f"--waive {name}: it is not among the options.{nearest(name, known)}")
        names.append(found)
    return names


def _reversed(options: argparse.Namespace, defined: dict[str, str]) -> Translation:
    of_bridge = options.system == "megatron-bridge"
    assignments = yaml_overrides(options.yaml) if options.yaml else []
    problems = []
    for word in define(split_args(options.args or ""), defined):
        try:
            assignments.append(split_override(word.text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    read = read_overrides(assignments, options.recipe, of_bridge)
    system = bridge.NAME if of_bridge else "Lockstep"
    translation = to_flags(read, options.recipe, system, options.waive)
    _names(options.waive, {verdict.option.written.flag for verdict in translation.verdicts})
    return translation


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
