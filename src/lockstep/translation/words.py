"""Command-line words grouped into options, by the rules of Megatron-LM's parser."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lockstep.errors import nearest

_NUMBER = re.compile(r"-\d+(\.\d*)?([eE][+-]?\d+)?|-\.\d+")
_BRACKETS = re.compile(r"\[[^\[\]]+\]")
_REFERENCE = re.compile(r"\$(?:\{[A-Za-z_]\w*(?::?[-=+?][^}]*)?\}|[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Word:
    """One word of a command line, and where it was written (``line 12``, or nothing)."""

    text: str
    place: str = ""


@dataclass(frozen=True)
class Written:
    """An option as written: its flag and the words that are its values."""

    flag: str
    values: tuple[str, ...]
    place: str = ""

    @property
    def shown(self) -> str:
        """The option as the user wrote it."""
        return " ".join((self.flag, *self.values))


def plain(words: Iterable[str]) -> list[Word]:
    """Return words that were written in one line."""
    return [Word(word) for word in words]


def has_reference(text: str) -> bool:
    """Tell whether a text refers to a shell variable, such as ``${DATA_PATH}/x``."""
    return _REFERENCE.search(text) is not None


def is_reference(text: str) -> bool:
    """Tell whether a text is one reference to a shell variable and nothing else."""
    return _REFERENCE.fullmatch(text) is not None


def group_options(
    words: Sequence[Word], arity: Callable[[str], str | None], known: Callable[[], Iterable[str]], problems: list[str]
) -> list[Written]:
    """Return the options of a command line; what cannot be one is added to ``problems``.

    Args:
        words: the words after the program's name.
        arity: how many values a flag takes: ``0``, ``1``, ``*`` or a number; None for a flag that is not known.
        known: all flags, for the nearest names of an unknown one.
        problems: receives one sentence a mistake.
    """
    options, index = [], 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.text.startswith("--"):
            problems.append(_at(word, f"unexpected word {word.text!r}; flags start with --"))
            continue
        flag, equals, value = word.text.partition("=")
        takes = arity(flag)
        if takes is None:
            problems.append(_at(word, f"unknown flag {flag}.{nearest(flag, known())}"))
            while index < len(words) and not _is_flag(words[index].text):
                index += 1
            continue
        values = [value] if equals else []
        while not equals and takes != "0" and index < len(words) and not _is_flag(words[index].text):
            if takes == "1" and values:
                break
            values.append(words[index].text)
            index += 1
        values = _without_brackets(values) if takes != "1" else values
        if takes == "0" and values:
            problems.append(_at(word, f"{flag} takes no value; drop {value!r}"))
        elif takes != "0" and not values and takes != "*":
            problems.append(_at(word, f"{flag} needs a value"))
        elif takes.isdigit() and takes not in "01" and len(values) != int(takes):
            problems.append(_at(word, f"{flag} needs {takes} values, got {len(values)}"))
        else:
            options.append(Written(flag, tuple(values), word.place))
    return options


def _at(word: Word, text: str) -> str:
    return f"{word.place}: {text}" if word.place else text


def _is_flag(text: str) -> bool:
    return text.startswith("-") and len(text) > 1 and not _NUMBER.fullmatch(text) and " " not in text


def _without_brackets(values: list[str]) -> list[str]:
    """Return the items of a list that Megatron-LM's test configurations write as one word, ``[a b c]``."""
    if len(values) == 1 and _BRACKETS.fullmatch(values[0]):
        return values[0][1:-1].replace(",", " ").split()
    return values
