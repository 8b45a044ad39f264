"""Every flag that Megatron-LM takes, read into the tree: also those that Lockstep refuses to train with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lockstep.config import ConfigContainer, FieldInfo, Origin, all_fields
from lockstep.config.fields import choices_of, coerce, describe, members
from lockstep.errors import ConfigError
from lockstep.megatron_lm.composites import COMPOSITES
from lockstep.megatron_lm.parser import from_text, is_switch, item_type, virtual_stages
from lockstep.translation.elsewhere import Elsewhere, elsewhere
from lockstep.translation.spellings import GONE, SPELLINGS, Spelling
from lockstep.translation.words import Word, Written, group_options, has_reference


@dataclass(frozen=True)
class Option:
    """What one written option asks for.

    Attributes:
        written: the flag or key and its words.
        sets: values of the tree by path; a value that only a shell knows is its text.
        elsewhere: the flag's entry, for a flag that has no place in the tree.
        inert: why Megatron-LM itself does nothing with it.
    """

    written: Written
    sets: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None
    inert: str = ""


@dataclass
class Reading:
    """A command line that was read: the tree it asks for, and its options one by one.

    ``deferred`` holds the values, by path, that only the shell of the job knows (``${REPEAT}`` for a number).
    """

    config: ConfigContainer = field(default_factory=ConfigContainer)
    options: list[Option] = field(default_factory=list)
    deferred: dict[str, str] = field(default_factory=dict)

    def put(self, path: str, value: Any, source: str) -> None:
        """Set a value of the tree, or remember that only the job's shell knows it."""
        if is_deferred(value, all_fields()[path]):
            self.deferred[path] = value
        else:
            self.config.set(path, value, Origin("command line", source))

    def names(self) -> set[str]:
        """Return the names of all options, as written."""
        return {option.written.flag for option in self.options}

    def given(self) -> set[str]:
        """Return the paths that some option sets."""
        return {path for option in self.options for path in option.sets}


_STACKS = ("hybrid_stack_spec", "mamba_stack_spec")


@cache
def known_flags() -> dict[str, str]:
    """Return how many values every known flag takes."""
    table = {flag: entry.arity for flag, entry in elsewhere().items()}
    for composite in COMPOSITES:
        table[composite.flag] = "1" if composite.takes_value else "0"
    for info in all_fields().values():
        table.update(dict.fromkeys(info.spec.flags, _arity(info)))
    table.update({flag: spelling.arity for flag, spelling in SPELLINGS.items()})
    return table


def _arity(info: FieldInfo) -> str:
    if is_switch(info):
        return "0"
    if info.path == "train.rampup_batch_size":
        return "3"
    return "1" if item_type(info) is None or info.path == "model.window_size" else "*"


def read_flags(words: Sequence[Word]) -> Reading:
    """Return what a Megatron-LM command line asks for.

    Raises:
        ConfigError: unknown flags, values of another type, flags that contradict each other; lists all of them.
    """
    problems: list[str] = []

    def arity(flag: str) -> str | None:
        return "*" if flag in GONE else known_flags().get(flag)

    written = group_options(words, arity, known_flags, problems)
    problems += [_said(option, f"{option.flag}: {GONE[option.flag]}") for option in written if option.flag in GONE]
    written = [option for option in _without_repetition(written, problems) if option.flag not in GONE]
    reading = Reading()
    for option in written:
        reading.options.append(_read(option, {other.flag: other for other in written}, problems))
    _fill(reading, problems)
    if problems:
        raise ConfigError(problems)
    return reading


def _said(option: Written, text: str) -> str:
    return f"{option.place}: {text}" if option.place else text


@cache
def _owners() -> dict[str, str]:
    """Return the path, or the first spelling, that every flag stands for."""
    owners = {flag: info.path for info in all_fields().values() for flag in info.spec.flags}
    owners.update({flag: s.path for flag, s in SPELLINGS.items() if s.path})
    return owners


def _without_repetition(options: Sequence[Written], problems: list[str]) -> list[Written]:
    seen: dict[str, Written] = {}
    for option in options:
        owner = _owners().get(option.flag, option.flag)
        earlier = seen.setdefault(owner, option)
        if earlier.values != option.values:
            problems.append(
                _said(
                    option, f"{earlier.shown} and {option.shown} are both given; Megatron-LM takes the last: keep one"
                )
            )
    return list(seen.values())


def _read(option: Written, others: Mapping[str, Written], problems: list[str]) -> Option:
    flag = option.flag
    if flag == "--spec" and option.values[-1:] and option.values[-1] in _STACKS:
        return Option(option, inert="it names the layers of hybrid models, which the layer pattern implies")
    if flag == "--spec" and option.values == ("local",):
        return Option(option, {"model.transformer_impl": "local"})
    if flag in elsewhere():
        return Option(option, elsewhere=elsewhere()[flag])
    if flag in SPELLINGS:
        return _read_spelling(option, SPELLINGS[flag], others, problems)
    info = _flag_fields().get(flag)
    if info is not None:
        if flag == "--num-query-groups" and "--group-query-attention" not in others:
            return Option(option, inert="Megatron-LM ignores it without --group-query-attention")
        return _read_field(option, info, problems)
    composite = next(c for c in COMPOSITES if c.flag == flag)
    if flag == "--group-query-attention":
        groups = others.get("--num-query-groups")
        return Option(option, {"model.num_query_groups": 1} if groups is None else {})
    return Option(option, dict(composite.sets))


@cache
def _flag_fields() -> dict[str, FieldInfo]:
    return {flag: info for info in all_fields().values() for flag in info.spec.flags}


def _read_field(option: Written, info: FieldInfo, problems: list[str]) -> Option:
    try:
        return Option(option, {info.path: _value(option.values, info)})
    except ValueError:
        choices = [str(choice) for choice in choices_of(info)]
        expected = f"one of {', '.join(choices)}" if choices else describe(info.type).removesuffix(" or null")
        shown = " ".join(option.values)
        problems.append(_said(option, f"{option.flag}: expected {expected}, got {shown!r}"))
        return Option(option)


def _value(values: Sequence[str], info: FieldInfo) -> Any:
    if is_switch(info):
        return not info.spec.negated
    if any(has_reference(word) for word in values) and not _is_text(info):
        return " ".join(values)
    if item_type(info) is not None:
        return coerce(from_text(list(values), info), info)
    return coerce(from_text(values[0], info), info)


def _is_text(info: FieldInfo) -> bool:
    if any(True for _ in choices_of(info)):
        return False
    return item_type(info) is str or (str in members(info.type) and int not in members(info.type))


def is_deferred(value: Any, info: FieldInfo) -> bool:
    """Tell whether a value is the text of a shell variable in place of one of the field's type."""
    return isinstance(value, str) and has_reference(value) and not _is_text(info)


def _read_spelling(option: Written, spelling: Spelling, others: Mapping[str, Written], problems: list[str]) -> Option:
    if spelling.path:
        return _read_field(option, all_fields()[spelling.path], problems)
    if spelling.yields_to and any(flag in others for flag in spelling.yields_to):
        return Option(option, inert=f"{spelling.yields_to[0]} says it")
    if spelling.only and option.values != (spelling.only,):
        problems.append(
            _said(option, f"{option.flag}: Megatron-LM takes {spelling.only} alone, got {option.values[0]}")
        )
    if option.flag == "--num-layers-per-virtual-pipeline-stage":
        return Option(option)
    return Option(option, dict(spelling.sets), inert=spelling.inert)


def _fill(reading: Reading, problems: list[str]) -> None:
    """Set the tree's values; report flags that contradict each other."""
    config = reading.config
    for option in reading.options:
        flag = option.written.flag
        for path, value in option.sets.items():
            earlier = config.origin(path)
            if earlier.kind == "command line" and config.get(path) != value:
                problems.append(_said(option.written, f"{earlier.detail} and {flag} contradict each other; drop one"))
            reading.put(path, value, flag)
    for number, option in enumerate(reading.options):
        if option.written.flag == "--num-layers-per-virtual-pipeline-stage":
            reading.options[number] = _virtual_stages(config, option, problems)
    flags = {option.written.flag for option in reading.options if option.written.values != ("0",)}
    problems += [
        f"{first} and {second} exclude each other; drop one"
        for first, second in _EXCLUDING
        if first in flags and second in flags
    ]


def _virtual_stages(config: ConfigContainer, option: Option, problems: list[str]) -> Option:
    path, found = "model.virtual_pipeline_model_parallel_size", len(problems)
    virtual_stages(config, list(option.written.values), problems)
    return option if len(problems) > found else Option(option.written, {path: config.get(path)})


_EXCLUDING = (
    ("--fp16", "--bf16"),
    ("--train-iters", "--train-samples"),
    ("--train-iters", "--lr-decay-samples"),
    ("--train-iters", "--lr-warmup-samples"),
    ("--train-samples", "--lr-decay-iters"),
    ("--train-samples", "--lr-warmup-iters"),
    ("--lr-warmup-fraction", "--lr-warmup-iters"),
    ("--lr-warmup-fraction", "--lr-warmup-samples"),
    ("--mock-data", "--data-path"),
    ("--mock-data", "--data-args-path"),
    ("--mock-data", "--train-data-path"),
    ("--data-path", "--data-args-path"),
    ("--data-path", "--train-data-path"),
    ("--step-batch-size-schedule", "--global-batch-size"),
    ("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"),
    ("--num-layers-per-virtual-pipeline-stage", "--pipeline-model-parallel-layout"),
    ("--multi-latent-attention", "--group-query-attention"),
    ("--hybrid-layer-pattern", "--hybrid-override-pattern"),
)
