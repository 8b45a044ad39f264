"""Megatron-LM's command line, read into the config tree; the parser is built from the tree's own fields."""

import argparse
import shlex
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any

from lockstep.arguments import StrictParser
from lockstep.config import ConfigContainer, FieldInfo, Origin, all_fields
from lockstep.config.derive import has_data
from lockstep.config.fields import choices_of, coerce, describe, members
from lockstep.errors import ConfigError, nearest
from lockstep.megatron_lm.composites import COMPOSITES, Composite


def parse_flags(argv: Sequence[str]) -> ConfigContainer:
    """Return the config tree that a Megatron-LM command line asks for; unset fields keep their defaults.

    Raises:
        ConfigError: unknown or refused flags and values of another type; lists all of them.
    """
    namespace, unknown = build_parser().parse_known_args(argv)
    problems = [f"unknown flag {word}.{nearest(word.partition('=')[0], known_flags())}" for word in _flags_in(unknown)]
    problems += [f"unexpected word {word!r}; flags start with --" for word in unknown if not _flags_in(unknown)]
    config = ConfigContainer()
    given: dict[str, Any] = vars(namespace)
    _apply_fields(config, given, problems)
    _apply_composites(config, given, problems)
    _apply_query_groups(config, given, problems)
    _apply_virtual_stages(config, given, problems)
    if problems:
        raise ConfigError(problems)
    if not config.dataset.mock and not has_data(config):
        raise ConfigError("no data set is named; give --data-path PREFIX, or --mock-data for generated data")
    return config


@cache
def flag_table() -> dict[str, FieldInfo | Composite]:
    """Return what each flag and alias stands for."""
    table: dict[str, FieldInfo | Composite] = {c.flag: c for c in COMPOSITES}
    for info in all_fields().values():
        table.update(dict.fromkeys(info.spec.flags, info))
    return table


def known_flags() -> list[str]:
    """Return every flag that is known, aliases included."""
    return list(flag_table())


@cache
def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser of all known flags, one group a section; values stay text."""
    parser = StrictParser(
        prog="pretrain_gpt.py",
        description="Train a GPT model with Megatron-LM's flags.",
        argument_default=argparse.SUPPRESS,
        help_column=36,
    )
    parser.add_argument("--print-config", action="store_true", help="Print the resolved configuration and stop.")
    parser.add_argument(
        "--show-samples", type=int, metavar="N", help="Print N samples for fine-tuning, what is learned marked; stop."
    )
    shorthands = parser.add_argument_group("shorthands")
    for composite in COMPOSITES:
        text = composite.help or composite.holds or f"Refused: {composite.refused}."
        kwargs: dict[str, Any] = {"nargs": "+"} if composite.takes_value else {"action": "store_true"}
        shorthands.add_argument(composite.flag, help=_escape(text), **kwargs)
    groups: dict[str, Any] = {}
    for info in all_fields().values():
        if not info.spec.flags:
            continue
        group = groups.setdefault(info.section, parser.add_argument_group(info.section))
        group.add_argument(*info.spec.flags, dest=info.path, help=_escape(help_text(info)), **_arity(info))
    return parser


def help_text(info: FieldInfo) -> str:
    """Return one sentence on a field: its meaning, or why it is accepted or refused."""
    if info.spec.refused:
        return f"Refused: {info.spec.refused}."
    return info.spec.help or f"Accepted: {info.spec.holds}."


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _arity(info: FieldInfo) -> dict[str, Any]:
    if is_switch(info):
        return {"action": "store_true"}
    kwargs: dict[str, Any] = {"metavar": describe(info.type).split(" or null")[0].replace("one of ", "")}
    if item_type(info) is not None:
        kwargs["nargs"] = "*"
    return kwargs


def is_switch(info: FieldInfo) -> bool:
    """Tell whether the field's flag takes no value."""
    return bool in members(info.type)


def item_type(info: FieldInfo) -> Any:
    """Return the type of the items where a flag takes several words; a list that text can spell is one word."""
    if str in members(info.type):
        return None
    for member in members(info.type):
        if typing.get_origin(member) is list:
            return typing.get_args(member)[0]
    return None


def _flags_in(words: Sequence[str]) -> list[str]:
    return [word for word in words if word.startswith("--")]


def _apply_fields(config: ConfigContainer, given: dict[str, Any], problems: list[str]) -> None:
    for info in all_fields().values():
        if info.path not in given:
            continue
        flag = info.spec.flags[0]
        raw = given[info.path]
        try:
            value = (not info.spec.negated) if is_switch(info) else coerce(from_text(raw, info), info)
        except ValueError:
            problems.append(f"{flag}: expected {_expected(info)}, got {_shown(raw)}")
            continue
        config.set(info.path, value, Origin("command line", flag))


def _expected(info: FieldInfo) -> str:
    spelled = [str(choice) for choice in choices_of(info)]
    return f"one of {', '.join(spelled)}" if spelled else describe(info.type).removesuffix(" or null")


def _shown(raw: Any) -> str:
    return repr(raw if isinstance(raw, str) else shlex.join(raw))


def from_text(raw: str | list[str], info: FieldInfo) -> Any:
    """Return the value that a flag's words stand for, by the field's type.

    Raises:
        ValueError: the words are not of that type.
    """
    item = item_type(info)
    if info.path == "model.window_size":
        raw = " ".join(raw).strip("()").replace(",", " ").split()  # one word there: 128,0
    if item is not None:
        return [_scalar(word, (item,)) for word in raw]
    assert isinstance(raw, str)
    return _scalar(raw, members(info.type))


def _scalar(word: str, kinds: tuple[Any, ...]) -> Any:
    if int in kinds or any(isinstance(arg, int) for kind in kinds for arg in typing.get_args(kind)):
        try:
            return int(word)
        except ValueError:
            if str not in kinds:
                raise
    if float in kinds:
        return float(word)
    return word


def _apply_composites(config: ConfigContainer, given: dict[str, Any], problems: list[str]) -> None:
    for composite in COMPOSITES:
        if composite.flag.removeprefix("--").replace("-", "_") not in given:
            continue
        if composite.refused:
            problems.append(f"{composite.flag}: {composite.refused}")
            continue
        for path, value in composite.sets.items():
            origin = config.origin(path)
            if origin.kind == "command line" and config.get(path) != value:
                problems.append(f"{composite.flag} and {origin.detail} contradict each other; drop one")
            config.set(path, value, Origin("command line", composite.flag))


def _apply_query_groups(config: ConfigContainer, given: dict[str, Any], problems: list[str]) -> None:
    """Apply Megatron-LM's rule: the number of groups counts only beside --group-query-attention, and is 1 there."""
    grouped = "group_query_attention" in given
    numbered = "model.num_query_groups" in given
    if numbered and not grouped:
        problems.append(
            "--num-query-groups has no effect without --group-query-attention; add that flag or drop this one"
        )
    if grouped and not numbered:
        config.set("model.num_query_groups", 1, Origin("command line", "--group-query-attention"))


def _apply_virtual_stages(config: ConfigContainer, given: dict[str, Any], problems: list[str]) -> None:
    if "num_layers_per_virtual_pipeline_stage" in given:
        virtual_stages(config, given["num_layers_per_virtual_pipeline_stage"], problems)


def virtual_stages(config: ConfigContainer, words: Sequence[str], problems: list[str]) -> None:
    """Turn the layers of a virtual stage, as ``words`` give them, into the number of virtual stages of a process."""
    flag = "--num-layers-per-virtual-pipeline-stage"
    path = "model.virtual_pipeline_model_parallel_size"
    if len(words) != 1 or not words[0].isdecimal() or int(words[0]) < 1:
        problems.append(f"{flag}: expected int above 0, got {_shown(words)}")
        return
    if config.origin(path).kind == "command line":
        problems.append(f"{flag} and {config.origin(path).detail} exclude each other; drop one")
        return
    m, layers = config.model, int(words[0])
    counted = m.account_for_embedding_in_pipeline_split + m.account_for_loss_in_pipeline_split
    per_process = ((m.num_layers or 0) + counted) // max(1, m.pipeline_model_parallel_size)
    if per_process % layers or not per_process:
        problems.append(
            f"{flag} = {layers} does not divide the {per_process} layers of a pipeline process; change one of them"
        )
        return
    config.set(path, per_process // layers, Origin("command line", flag))
