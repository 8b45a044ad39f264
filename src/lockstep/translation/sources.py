"""Where the user's run is written: words in quotes, a YAML file, or a launch script."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError
from lockstep.translation.words import Word

_BRACKETS = re.compile(r"\[[^\[\]]+\]")
_REFERENCE = re.compile(r"\$\{?(\w+)(?::?-[^}]*)?\}?")


def split_args(text: str) -> list[Word]:
    """Return the words of a quoted command line.

    Raises:
        ConfigError: a quote that is never closed.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=False)
    except ValueError as error:
        raise ConfigError(f"--args: {str(error).lower()}; close the quote, or put one before it") from None
    while words and (words[0].endswith(".py") or words[0] in ("python", "python3")):
        words.pop(0)
    return [Word(word) for word in words]


def define(words: list[Word], defined: Mapping[str, str]) -> list[Word]:
    """Return words with the references replaced whose values the user gave by ``--define``."""

    def value(match: re.Match[str]) -> str:
        return defined.get(match[1], match[0])

    return [Word(_REFERENCE.sub(value, word.text), word.place) for word in words] if defined else words


def load_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping, every scalar as the text that is written.

    Raises:
        ConfigError: no file, no YAML, no mapping, or a key that is repeated.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # every scalar stays text: 1e-5 is not rounded, on is not true

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"{key.value} is repeated", problem_mark=key.start_mark)
            seen.add(key.value)
        for key, _ in node.value:
            if key.value == "<<":
                key.tag = "tag:yaml.org,2002:merge"
        loader.flatten_mapping(node)
        return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {getattr(error, 'problem', None) or error}; mend the YAML") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping, such as MODEL_ARGS: with flags below it")
    return loaded


def yaml_flags(path: Path) -> list[Word]:
    """Return the words of a YAML file's ``MODEL_ARGS``, as Megatron-LM's own launcher makes them.

    Raises:
        ConfigError: the file cannot be read, has no such section, or gives a switch another value than true.
    """
    loaded = load_yaml(path)
    arguments = loaded.get("MODEL_ARGS", loaded)
    if not isinstance(arguments, dict) or not all(str(key).startswith("-") or "." in str(key) for key in arguments):
        raise ConfigError(f"{path}: no MODEL_ARGS section with flags such as --num-layers: 2 is in it")
    words = []
    for flag, value in arguments.items():
        texts = [item for part in value for item in shlex.split(part)] if isinstance(value, list) else _texts(value)
        if texts == ["false"] or (not texts and value != ""):
            raise ConfigError(f"{path}: {flag}: {value}: a switch is true or left out; drop the line")
        if value != "":
            words += [Word(flag, str(path)), *(Word(text, str(path)) for text in texts if text != "true" or texts[1:])]
    return words


def _texts(value: Any) -> list[str]:
    text = str(value).strip()
    if _BRACKETS.fullmatch(text):
        return shlex.split(text[1:-1])
    return [text] if text else []


def yaml_overrides(path: Path) -> list[tuple[str, Any]]:
    """Return the keys and values of a YAML file in Bridge's layout; keys that start with an underscore are left out.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    import yaml

    load_yaml(path)
    return list(_flatten(yaml.safe_load(path.read_text(encoding="utf-8"))))


_FORMER_SECTIONS = {"training": "train", "logging": "logger", "data": "dataset"}


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = str(key) if prefix else _FORMER_SECTIONS.get(str(key), str(key))
        if name.startswith("_"):
            continue
        if isinstance(value, Mapping) and not prefix:
            yield from _flatten(value, f"{name}.")
        elif name != "mixed_precision" or not isinstance(value, Mapping):
            yield f"{prefix}{name}", value
