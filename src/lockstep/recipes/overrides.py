"""Overrides in Hydra's grammar and YAML files, applied to the config tree."""

import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.config import ConfigContainer, FieldInfo, Origin, Ref, all_fields, canonical
from lockstep.config.container import SECTIONS, is_group
from lockstep.config.fields import coerce, members
from lockstep.config.finetuning import former_settings
from lockstep.config.section import OriginKind
from lockstep.errors import ConfigError
from lockstep.recipes.precision import preset


def apply_overrides(config: ConfigContainer, overrides: Sequence[str]) -> None:
    """Set the ``key=value`` words of a command line, in place and in order.

    ``+`` and ``++`` before a key are accepted and mean the same: a typed tree has nothing to add.

    Raises:
        ConfigError: bad grammar, unknown keys, values of another type, or two spellings of one key with different
            values; lists every problem.
    """
    problems: list[str] = []
    assignments: list[tuple[str, Any]] = []
    for word in overrides:
        try:
            assignments += parse_override(word)
        except ConfigError as error:
            problems += error.problems
    _assign(config, assignments, "command line", "", problems)


def apply_yaml(config: ConfigContainer, file: Path) -> None:
    """Set the keys of a YAML file (sections with their keys), in place.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, repeats a key, or holds what ``apply_overrides`` refuses.
    """
    from omegaconf import OmegaConf

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; give the path of a YAML file") from None
    except Exception as error:  # the YAML parser has many error types; all are the user's file
        first = " ".join(str(error).split())
        raise ConfigError(f"{file}: {first}") from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{file}: expected sections with keys, such as model: {{num_layers: 2}}")
    _assign(config, list(_flatten(loaded)), "file", f"{file}: ", [])


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    sections = {cls.section_name for cls in SECTIONS}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and (path in sections or is_group(path)):
            yield from _flatten(value, f"{path}.")
        elif isinstance(value, str):
            yield path, _reference(value)
        else:
            yield path, value


_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)(?:,([^}]*))?\}")


def _reference(text: str) -> Any:
    whole = text.startswith("${") and text.endswith("}") and not _ENVIRONMENT.search(text)
    return Ref(text[2:-1]) if whole else text


def _from_environment(key: str, text: str, info: FieldInfo) -> Any:
    """Return a text with ``${oc.env:NAME}`` and ``${oc.env:NAME,default}`` replaced, as OmegaConf does."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ConfigError(f"{key}: the environment has no {match[1]}; set it, or write a value")
        return found

    replaced = _ENVIRONMENT.sub(value, text)
    if str in members(info.type):
        return replaced
    for kind in (int, float):
        try:
            return kind(replaced)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(replaced.lower(), replaced)


def parse_override(word: str) -> list[tuple[str, Any]]:
    """Return the key and the value of one ``key=value`` word.

    Raises:
        ConfigError: it is not in Hydra's grammar, or asks for what one run cannot take.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override, QuotedString
    from hydra.errors import HydraException

    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"{word!r} is not an override; write key=value")
    try:
        parsed: Override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{word!r} is not in the override grammar: {reason}; quote the value") from None
    key = str(parsed.key_or_group)
    if parsed.is_delete():
        raise ConfigError(f"~{key}: keys of a typed tree cannot be deleted; set {key} to the value you want")
    if parsed.is_sweep_override():
        return [(key, _one_value(key, word.partition("=")[2]))]
    value = parsed.value()
    if isinstance(value, QuotedString):
        value = value.text
    if isinstance(value, str):
        value = _reference(value)
    return [(key, value)]


def _one_value(key: str, text: str) -> str:
    """Return the text of what the grammar takes for a sweep, such as ``dataset.split=969,30,1``, if the key is text."""
    if str not in members(all_fields()[canonical(key)].type):
        raise ConfigError(f"{key}={text}: a comma makes a sweep, and one run takes one value; give one")
    return text


def _assign(
    config: ConfigContainer,
    assignments: Sequence[tuple[str, Any]],
    kind: OriginKind,
    prefix: str,
    problems: list[str],
) -> None:
    spelled: dict[str, tuple[str, Any]] = {}
    for key, value in assignments:
        try:
            for path, item in expand(key, value):
                earlier_key, earlier = spelled.get(path, (key, item))
                if earlier_key != key and earlier != item:
                    problems.append(
                        f"{prefix}{earlier_key}={earlier} and {key}={item} are one setting; give both the same value"
                    )
                spelled[path] = (key, item)
                config.set(path, item, Origin(kind, f"{prefix}{key}"))
        except ConfigError as error:
            problems += [prefix + problem for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def expand(key: str, value: Any) -> list[tuple[str, Any]]:
    """Return the fields that one key sets, with values of their types.

    Raises:
        ConfigError: unknown key, or a value of another type.
    """
    if key == "mixed_precision" and isinstance(value, str):
        return list(preset(value).items())
    if key == "peft" and (value is None or isinstance(value, str)):
        key = "peft.scheme"  # Bridge has an object or null there
    if is_group(key) and isinstance(value, Mapping):
        return [pair for name, item in value.items() for pair in expand(f"{key}.{name}", item)]
    former = former_settings(key, value)
    if former is not None:
        return former
    path = canonical(key)
    info = all_fields()[path]
    if isinstance(value, str) and _ENVIRONMENT.search(value):
        value = _from_environment(key, value, info)
    if isinstance(value, Ref) and "." not in value.path and _takes_text(info):
        value = str(value)  # no key of the tree lacks a dot: this is a shell variable, and stays text
    if isinstance(value, Ref):
        return [(path, Ref(canonical(value.path)))]
    if isinstance(value, str) and not value.startswith("[") and _takes_list(info):
        value = value.split()
    elif type(value) in (int, float) and type(value) not in members(info.type) and _takes_list(info):
        value = [value]
    try:
        return [(path, coerce(value, info))]
    except ValueError as error:
        quoted = f"; quote it: {key}='\"{value}\"'" if str in members(info.type) else ""
        raise ConfigError(f"{key}: expected {error}, got {value!r}{quoted}") from None


def _takes_text(info: FieldInfo) -> bool:
    return any(kind is str or typing.get_args(kind) == (str,) for kind in members(info.type))


def _takes_list(info: FieldInfo) -> bool:
    kinds = members(info.type)
    return str not in kinds and any(typing.get_origin(member) is list for member in kinds)
